"""Read models of dead letters, in Redis and in the database."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pydantic_core import to_jsonable_python
from redis.asyncio import Redis

from ..plumbing._util.passwords import mask
from ..plumbing.broker.dead_letter_stream import dead_letter_heads
from ..plumbing.broker.models import TaskMessage
from ..plumbing.broker.stored import UNDECODABLE, moment_of
from ..plumbing.messages.codec import leading_fields
from ..plumbing.persistence.dead_letter import OPEN, DeadLetterStatus
from .cursors import HEAD_BYTES, Registry, check_stream_cursor
from .masking import has_secrets, masked, masked_arguments, shown_labels
from .models import Page, WaitingDeadLetter, as_json
from .visibility import Viewer

if TYPE_CHECKING:
    from ..plumbing.persistence import TaskDB
    from ..plumbing.persistence.db import DeadLetterFilter

_PAGE = 200
#: Status as given by users -> statuses in the database; None: any.
STATUSES: dict[str, tuple[DeadLetterStatus, ...] | None] = {
    "open": OPEN,
    **{status.lower(): (status,) for status in DeadLetterStatus},
    "any": None,
}


async def waiting_dead_letters(
    redis: Redis, limit: int = 100, after: str | None = None, *, registry: Registry | None = None
) -> Page[WaitingDeadLetter]:
    """Return the dead letters that wait in Redis, oldest first."""
    first = "-" if after is None else f"({check_stream_cursor(after)}"
    entries = await dead_letter_heads(redis, first, limit + 1, HEAD_BYTES)
    dead_letters = [_waiting(*entry, registry) for entry in entries[:limit]]
    return Page(items=dead_letters, after=dead_letters[-1].entry if len(entries) > limit else None)


def _waiting(
    entry: str, fields: Mapping[bytes, bytes], length: int, registry: Registry | None
) -> WaitingDeadLetter:
    try:
        fields_read, _ = leading_fields(fields[b"data"])
    except (KeyError, ValueError):
        fields_read = {}
    message = _message(fields_read.get("data", b""))
    name = _text(fields_read.get("task_name"))
    attempts = fields_read.get("attempts")
    return WaitingDeadLetter(
        entry=entry,
        buried=moment_of(int(entry.partition("-")[0]) / 1000),
        task_id=_text(fields_read.get("task_id") or fields.get(b"task")),
        task_name=name,
        reason=_text(fields_read.get("reason") or fields.get(b"reason")),
        detail=_text(fields_read.get("detail") if fields_read else UNDECODABLE),
        failed_attempts=len(attempts) if isinstance(attempts, list) else None,
        arguments=None if message is None else masked_arguments((registry or {}).get(name), message),
        vo=_text(fields_read.get("vo")) or None,
        message_bytes=length,
    )


async def find_dead_letter(db: TaskDB, key: str, viewer: Viewer) -> dict[str, Any] | None:
    """Find a dead letter by task id or number; None if there is none that the viewer may see."""
    dead_letter = await db.find(key)
    return dead_letter if dead_letter is not None and viewer.sees(dead_letter["vo"]) else None


@dataclass(frozen=True, slots=True)
class Decided:
    """Result of resubmitting or discarding dead letters."""

    done: list[Mapping[str, Any]]
    """Dead letters that were submitted again, or discarded."""
    already: list[Mapping[str, Any]]
    """Dead letters that were submitted again before."""
    refused: list[tuple[Mapping[str, Any], str]]
    """The others, and why."""


async def dead_letter_summaries(
    db: TaskDB, where: DeadLetterFilter, limit: int | None = None
) -> AsyncIterator[dict[str, Any]]:
    """Iterate over the dead letters that match a filter, oldest first, without messages and tracebacks."""
    after_id, left = 0, limit
    while left is None or left > 0:
        page = await db.summaries(**where, limit=_PAGE if left is None else min(_PAGE, left), after_id=after_id)
        if not page:
            return
        after_id = page[-1]["id"]
        left = None if left is None else left - len(page)
        for dead_letter in page:
            yield dead_letter


def _text(value: Any) -> str:
    """Convert a field of a dead letter of unknown type to text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value if isinstance(value, str) else ""


def _message(data: Any) -> TaskMessage | None:
    try:
        return TaskMessage.loadb(data)
    except (TypeError, ValueError):
        return None


def dead_letter_summary(dead_letter: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a dead letter of `TaskDB.summaries` to a record without message and tracebacks."""
    return _about(dead_letter, "failed_attempts", "earlier_burials", "message_bytes")


def _about(dead_letter: Mapping[str, Any], *more: str) -> dict[str, Any]:
    return {
        **{name: dead_letter[name] for name in ("id", "task_id", "task_name", "vo", "reason", *more)},
        "detail": mask(dead_letter["detail"]),
        "status": str(dead_letter["status"]),
        "buried_at": dead_letter["buried_at"].isoformat(),
        "changed_at": dead_letter["changed_at"].isoformat(),
    }


def dead_letter_record(dead_letter: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a dead letter to a record. `message` is None if it cannot be decoded, `raw` if it has secrets."""
    return {
        **_about(dead_letter, "attempts", "history"),
        "burial": dead_letter["delivery_id"],
        **_message_record(dead_letter["message"]),
    }


def _message_record(data: bytes) -> dict[str, Any]:
    raw = base64.b64encode(data).decode()
    try:
        message = TaskMessage.loadb(data)
    except ValueError:
        return {"message": None, "raw": raw}
    args, kwargs = masked(None, message)
    # Without its failed attempts, which are in `attempts`.
    shown = {**asdict(message), "task_args": args, "task_kwargs": kwargs, "labels": shown_labels(message)}
    with suppress(Exception):  # such as text that is not UTF-8, which as_json accepts
        shown = to_jsonable_python(shown, fallback=repr, bytes_mode="base64", inf_nan_mode="strings")
    message_shown = as_json(shown)
    return {"message": message_shown, "raw": None if has_secrets(message) else raw}


def dead_letter_arguments(dead_letter: Mapping[str, Any], registry: Registry) -> dict[str, Any] | None:
    """Return the masked arguments of a dead letter; None if its message cannot be decoded."""
    message = _message(dead_letter["message"])
    return None if message is None else masked_arguments(registry.get(message.task_name), message)
