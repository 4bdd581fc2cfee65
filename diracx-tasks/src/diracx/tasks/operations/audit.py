"""The audit log: capped Redis streams to which each action is written before it is performed.

Administrators share a stream, and each VO has one for its members, so that actions of one VO cannot displace those
of administrators or other VOs. See `diracx.tasks.operations.audited_actions` for the actions on tasks.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

from ..plumbing.broker import audit_stream
from ..plumbing.broker.stored import moment_of, text_of
from .cursors import check_stream_cursor, entry_parts
from .models import Page

logger = logging.getLogger(__name__)

#: Maximum length of a stream; an action takes two entries.
KEPT_ENTRIES = 20_000
#: Time to live of a stream after its last action.
_TTL_SECONDS = 365 * 86400
#: Maximum lengths in characters; a target of administrators may be a thousand task ids.
_LONGEST_WHO = 200
_LONGEST_TARGET, _LONGEST_TARGET_OF_VO = 40_000, 300
_LONGEST_OUTCOME, _LONGEST_OUTCOME_OF_VO = 2000, 300

_Outcome = TypeVar("_Outcome")


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One audited action."""

    id: str
    at: datetime
    who: str
    via: str
    """`dashboard`, `api` or `cli`."""
    action: str
    """Such as `retry dead letters`."""
    target: str
    """Object of the action, such as a task, queue or lock."""
    outcome: str | None
    """Result; None if unknown: it is in progress, its process crashed, or the result could not be written."""
    ok: bool | None
    """True if it succeeded."""


class AuditLog:
    """Performs actions of one user; writes each to the audit log before, and its outcome after.

    Args:
        redis: the server of the tasks, which has the log.
        who: the user, as written to the log.
        via: `dashboard`, `api` or `cli`.
        vo: the VO of the user, whose log is used; None: that of administrators. Must exist: each VO has its own
            stream.
    """

    def __init__(self, redis: Redis, who: str, via: str, vo: str | None = None) -> None:
        self.redis = redis
        self.who = who
        self.via = via
        self.vo = vo

    async def perform(
        self,
        action: str,
        target: str,
        do: Callable[[], Awaitable[_Outcome]],
        summary: Callable[[_Outcome], str] = str,
    ) -> _Outcome:
        """Perform an action. If its outcome cannot be written, a warning is logged.

        Args:
            target: the object of the action; use `listed` for several.
            do: performs the action.
            summary: formats its outcome in a few words.

        Raises:
            redis.exceptions.RedisError: the action cannot be written to the log, and is not performed.
            Exception: raised by `do`.
        """
        shown = _cut(target, _LONGEST_TARGET if self.vo is None else _LONGEST_TARGET_OF_VO)
        entry = await self._write(who=_cut(self.who, _LONGEST_WHO), target=shown, via=self.via, action=action)
        try:
            outcome = await do()
        except BaseException as error:
            await self._end(entry, f"{type(error).__name__}: {error}", False)
            raise
        await self._end(entry, summary(outcome), True)
        return outcome

    async def _write(self, **fields: str) -> str:
        data = json.dumps(fields, ensure_ascii=False)
        return text_of(
            await audit_stream.append(self.redis, self.vo, data, kept=KEPT_ENTRIES, ttl_seconds=_TTL_SECONDS)
        )

    async def _end(self, entry: str, text: str, ok: bool) -> None:
        shown = _cut(text, _LONGEST_OUTCOME if self.vo is None else _LONGEST_OUTCOME_OF_VO)
        try:
            await self._write(of=entry, ok=str(int(ok)), outcome=shown)
        except RedisError as error:
            logger.warning(
                "the outcome of entry %s (%s) cannot be written to the audit log: %s", entry, text, error
            )


def listed(names: Sequence[str]) -> str:
    """Join names, after their number if there are several."""
    return names[0] if len(names) == 1 else f"{len(names)}: {', '.join(names)}"


def user_at_host() -> str:
    """Return user (by the user id, not the environment) and host of this process: `wilma@head.example.org`."""
    import pwd

    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container whose user has no name
        name = f"uid-{os.getuid()}"
    return f"{name}@{socket.gethostname()}"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}… (the first {longest} of {len(text)} characters)"


async def read_audit(
    redis: Redis, limit: int = 100, before: str | None = None, *, vo: str | None = None
) -> list[AuditEntry]:
    """Read audited actions, newest first.

    Args:
        before: only actions older than that of this id.
        vo: actions of this VO's members; None: of administrators.
    """
    newest = f"({before}" if before else "+"
    found: list[AuditEntry] = []
    # The outcome of a slow action is newer than actions of the previous page.
    newer = await audit_stream.entries(redis, vo, before, 1000) if before else []
    ends = {data["of"]: data for _, data in _decoded(newer) if "of" in data}
    while len(found) < limit:
        rows = await audit_stream.entries(redis, vo, newest, 2 * limit, backwards=True)
        for entry, data in _decoded(rows):
            newest = f"({entry}"
            if "of" in data:
                ends[data["of"]] = data
            elif len(found) < limit:
                found.append(_entry(entry, data, ends.get(entry, {})))
        if len(rows) < 2 * limit:
            break
    return found


async def audit_page(
    redis: Redis, limit: int = 100, after: str | None = None, *, vo: str | None = None
) -> Page[AuditEntry]:
    """Read a page of audited actions, newest first. Arguments and errors as of `read_audit`."""
    found = await read_audit(redis, limit + 1, None if after is None else check_stream_cursor(after), vo=vo)
    return Page(items=found[:limit], after=found[limit - 1].id if len(found) > limit else None)


def _decoded(rows: Sequence[Any]) -> list[tuple[str, dict[str, str]]]:
    # Entries of other versions may be unreadable, and are skipped.
    found = []
    for entry, fields in rows:
        try:
            data = {str(name): str(value) for name, value in json.loads(fields[b"data"]).items()}
        except (AttributeError, KeyError, RecursionError, ValueError):
            continue
        found.append((text_of(entry), data))
    return found


def _entry(entry: str, data: dict[str, str], end: dict[str, str]) -> AuditEntry:
    return AuditEntry(
        id=entry,
        at=moment_of(entry_parts(entry)[0] / 1000),
        who=data.get("who", "?"),
        via=data.get("via", "?"),
        action=data.get("action", "?"),
        target=data.get("target", ""),
        outcome=end.get("outcome"),
        ok={"1": True, "0": False}.get(end.get("ok", "")),
    )
