"""Dead letters: those that wait in Redis for a worker with a database, and the records of all."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import asdict
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
    letters = [_waiting(*entry, registry) for entry in entries[:limit]]
    return Page(items=letters, after=letters[-1].entry if len(entries) > limit else None)


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
    letter = await db.find(key)
    return letter if letter is not None and viewer.sees(letter["vo"]) else None


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
    """A field of a letter that anybody may have written."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value if isinstance(value, str) else ""


def _message(data: Any) -> TaskMessage | None:
    try:
        return TaskMessage.loadb(data)
    except (TypeError, ValueError):
        return None


def dead_letter_summary(letter: Mapping[str, Any]) -> dict[str, Any]:
    """A letter of `TaskDB.summaries` as `dlq list --json` has it: without its message and its tracebacks."""
    return {
        **_about(letter),
        "failed_attempts": letter["failed_attempts"],
        "earlier_burials": letter["earlier_burials"],
        "message_bytes": letter["message_bytes"],
    }


def _about(letter: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": letter["id"],
        "task_id": letter["task_id"],
        "task_name": letter["task_name"],
        "vo": letter["vo"],
        "reason": letter["reason"],
        "detail": mask(letter["detail"]),
        "status": str(letter["status"]),
        "buried_at": letter["buried_at"].isoformat(),
        "changed_at": letter["changed_at"].isoformat(),
    }


def dead_letter_record(letter: Mapping[str, Any]) -> dict[str, Any]:
    """A letter with everything. `message` is None where it cannot be read, `raw` where there are secrets in it."""
    return {
        **_about(letter),
        "burial": letter["delivery_id"],
        "attempts": letter["attempts"],
        "history": letter["history"],
        **_message_record(letter["message"]),
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


def dead_letter_arguments(letter: Mapping[str, Any], registry: Registry) -> dict[str, Any] | None:
    """The arguments in the message of a letter, as anybody may see them; None where it cannot be read."""
    message = _message(letter["message"])
    return None if message is None else masked_arguments(registry.get(message.task_name), message)
