"""Dead letters: those that wait in Redis for a worker with a database, and the records of all."""

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
from ..plumbing.broker.stored import UNDECODABLE
from ..plumbing.messages.codec import leading_fields
from .cursors import HEAD_BYTES, Registry, moment, place_in_stream
from .masking import has_secrets, masked, masked_arguments, shown_labels
from .models import Page, WaitingDeadLetter, as_json
from .visibility import Viewer

if TYPE_CHECKING:
    from ..plumbing.persistence import TaskDB
    from ..plumbing.persistence.db import DeadLetterFilter

_PAGE = 200


async def waiting_dead_letters(
    redis: Redis, limit: int = 100, after: str | None = None, *, registry: Registry | None = None
) -> Page[WaitingDeadLetter]:
    """Return the dead letters that wait in Redis, oldest first.

    Raises:
        ValueError: when `after` is not from a page of them.
    """
    first = "-" if after is None else f"({place_in_stream(after)}"
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
        buried=moment(int(entry.partition("-")[0]) / 1000),
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
    """The dead letter of this task id or number; None where there is none that the viewer sees."""
    dead_letter = await db.find(key)
    return dead_letter if dead_letter is not None and viewer.sees(dead_letter["vo"]) else None


@dataclass(frozen=True, slots=True)
class Decided:
    """Result of resubmitting or discarding dead letters."""

    done: list[Mapping[str, Any]]
    """Dead letters that were submitted again, or discarded."""
    already: list[Mapping[str, Any]]
    """Dead letters for which another user had done so."""
    refused: list[tuple[Mapping[str, Any], str]]
    """The others, and why."""


async def dead_letter_summaries(
    db: TaskDB, where: DeadLetterFilter, limit: int | None = None
) -> AsyncIterator[dict[str, Any]]:
    """The dead letters that a filter lets through, oldest first, without their contents; read page by page."""
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
    """A field of a dead letter that anybody may have written."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value if isinstance(value, str) else ""


def _message(data: Any) -> TaskMessage | None:
    try:
        return TaskMessage.loadb(data)
    except (TypeError, ValueError):
        return None


def dead_letter_summary(dead_letter: Mapping[str, Any]) -> dict[str, Any]:
    """A dead letter of `TaskDB.summaries` as `dlq list --json` has it: without its message and its tracebacks."""
    return {
        **_about(dead_letter),
        "failed_attempts": dead_letter["failed_attempts"],
        "earlier_burials": dead_letter["earlier_burials"],
        "message_bytes": dead_letter["message_bytes"],
    }


def _about(dead_letter: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": dead_letter["id"],
        "task_id": dead_letter["task_id"],
        "task_name": dead_letter["task_name"],
        "vo": dead_letter["vo"],
        "reason": dead_letter["reason"],
        "detail": mask(dead_letter["detail"]),
        "status": str(dead_letter["status"]),
        "buried_at": dead_letter["buried_at"].isoformat(),
        "changed_at": dead_letter["changed_at"].isoformat(),
    }


def dead_letter_record(dead_letter: Mapping[str, Any]) -> dict[str, Any]:
    """All of a dead letter. `message` is None where it cannot be read, `raw` where there are secrets in it."""
    return {
        **_about(dead_letter),
        "burial": dead_letter["delivery_id"],
        "attempts": dead_letter["attempts"],
        "history": dead_letter["history"],
        **_message_record(dead_letter["message"]),
    }


def _message_record(data: bytes) -> dict[str, Any]:
    raw = base64.b64encode(data).decode()
    try:
        message = TaskMessage.loadb(data)
    except ValueError:
        return {"message": None, "raw": raw}
    args, kwargs = masked(None, message)
    # Its failed attempts are in `attempts`, once.
    shown = {**asdict(message), "task_args": args, "task_kwargs": kwargs, "labels": shown_labels(message)}
    with suppress(Exception):  # as for text that is no UTF-8: as_json takes everything
        shown = to_jsonable_python(shown, fallback=repr, bytes_mode="base64", inf_nan_mode="strings")
    message_shown = as_json(shown)
    return {"message": message_shown, "raw": None if has_secrets(message) else raw}


def dead_letter_arguments(dead_letter: Mapping[str, Any], registry: Registry) -> dict[str, Any] | None:
    """The arguments in the message of a dead letter, as anybody may see them; None where it cannot be read."""
    message = _message(dead_letter["message"])
    return None if message is None else masked_arguments(registry.get(message.task_name), message)
