"""Dead letters that wait in Redis until a worker with a database takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..plumbing.broker import keys
from ..plumbing.broker.models import TaskMessage
from ..plumbing.wire import loads
from .masking import masked_arguments
from .models import Page, WaitingLetter
from .places import Registry, moment, place_in_stream

if TYPE_CHECKING:
    from redis.asyncio import Redis


async def waiting_letters(
    redis: Redis, limit: int = 100, after: str | None = None, *, registry: Registry | None = None
) -> Page[WaitingLetter]:
    """Those letters, oldest first.

    Raises:
        ValueError: when `after` is not from a page of them.
    """
    first = "-" if after is None else f"({place_in_stream(after)}"
    entries: Any = await redis.xrange(keys.DEAD_LETTERS, min=first, count=limit + 1)
    letters = [_letter(entry.decode(), fields, registry) for entry, fields in entries[:limit]]
    return Page(items=letters, after=letters[-1].entry if len(entries) > limit else None)


def _letter(entry: str, fields: Mapping[bytes, bytes], registry: Registry | None) -> WaitingLetter:
    try:
        told = loads(fields[b"data"])
    except (KeyError, ValueError):
        told = {}
    message = _message(told.get("data", b""))
    name = str(told.get("task_name", ""))
    attempts = told.get("attempts", ())
    return WaitingLetter(
        entry=entry,
        buried=moment(int(entry.partition("-")[0]) / 1000),
        task_id=str(told.get("task_id", "")),
        task_name=name,
        reason=str(told.get("reason") or fields.get(b"reason", b"").decode(errors="replace")),
        detail=str(told.get("detail", "")),
        failed_attempts=len(attempts) if isinstance(attempts, list) else 0,
        arguments=None if message is None else masked_arguments((registry or {}).get(name), message),
    )


def _message(data: Any) -> TaskMessage | None:
    try:
        return TaskMessage.loadb(data)
    except (TypeError, ValueError):
        return None
