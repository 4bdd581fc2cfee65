"""The audit log: capped streams that every action is written to before it is done.

Administrators' actions have one stream; what the members of a VO do has a stream of that VO. So nothing that
users do can push an administrator's action, or another VO's, out of the log. The actions on tasks are in
`diracx.tasks.operations.audited_actions`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

from ..plumbing.broker import audit_stream
from .cursors import place_in_stream
from .models import Page

logger = logging.getLogger(__name__)

#: Entries of a stream that are kept, an action being two of them.
_KEPT = 20_000
#: The log of an installation where nobody acts any more goes after a year.
_TTL_SECONDS = 365 * 86400
#: Characters of who acts, in any stream.
_LONGEST_WHO = 200
#: Characters of a target: a thousand task ids. What users do is about one thing.
_LONGEST_TARGET, _LONGEST_TARGET_OF_VO = 40_000, 300
_LONGEST_OUTCOME, _LONGEST_OUTCOME_OF_VO = 2000, 300

_Outcome = TypeVar("_Outcome")


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One action."""

    id: str
    at: datetime
    who: str
    via: str
    """`dashboard`, `api` or `cli`."""
    action: str
    """As `retry dead letters`."""
    target: str
    """Object of the action, such as a task, queue or lock."""
    outcome: str | None
    """Result; None: not known, as it is not over, its process died, or this could not be written."""
    ok: bool | None
    """True if it was done."""


async def audited(
    redis: Redis,
    who: str,
    via: str,
    action: str,
    target: str,
    do: Callable[[], Awaitable[_Outcome]],
    summary: Callable[[_Outcome], str] = str,
    *,
    vo: str | None = None,
) -> _Outcome:
    """Do an action, and write it to the audit log: before, and what came of it after.

    Where the latter cannot be written, it was done all the same: the log does not know what came of it, and a
    warning says so.

    Args:
        target: what it is done to; `listed` where these are several.
        do: does it.
        summary: what came of it, in a few words.
        vo: whose log has it, for what a member of a VO does; None: that of the administrators. It must be known to
            be one of the installation: each has a stream of its own.

    Raises:
        redis.exceptions.RedisError: when it cannot be written down; it is not done then.
        Exception: whatever `do` raises.
    """
    log = _Log(redis, vo)
    written = await log.begin(who, via, action, target)
    try:
        outcome = await do()
    except BaseException as error:
        await log.end(written, f"{type(error).__name__}: {error}", ok=False)
        raise
    await log.end(written, summary(outcome), ok=True)
    return outcome


def listed(names: Sequence[str]) -> str:
    """All of them, and how many they are where that is not one."""
    return names[0] if len(names) == 1 else f"{len(names)}: {', '.join(names)}"


def user_at_host() -> str:
    """User of a command line, as `wilma@head.example.org`: by the user id, whatever the environment says."""
    import pwd

    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container whose user has no name
        name = f"uid-{os.getuid()}"
    return f"{name}@{socket.gethostname()}"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}… (the first {longest} of {len(text)} characters)"


class _Log:
    """The stream of a VO, or (None) of the administrators."""

    def __init__(self, redis: Redis, vo: str | None) -> None:
        self._redis = redis
        self._vo = vo
        self._longest_target = _LONGEST_TARGET if vo is None else _LONGEST_TARGET_OF_VO
        self._longest_outcome = _LONGEST_OUTCOME if vo is None else _LONGEST_OUTCOME_OF_VO

    async def begin(self, who: str, via: str, action: str, target: str) -> str:
        """Write what is about to be done. Returns the entry's id."""
        shown = {"who": _cut(who, _LONGEST_WHO), "target": _cut(target, self._longest_target)}
        return await self._write({**shown, "via": via, "action": action})

    async def end(self, entry: str, outcome: str, *, ok: bool) -> None:
        """Write what came of an entry, or warn that this could not be written."""
        try:
            await self._write({"of": entry, "ok": str(int(ok)), "outcome": _cut(outcome, self._longest_outcome)})
        except RedisError as error:
            logger.warning(
                "the outcome of entry %s (%s) cannot be written to the audit log: %s", entry, outcome, error
            )

    async def _write(self, fields: dict[str, str]) -> str:
        data = json.dumps(fields, ensure_ascii=False)
        return _text(await audit_stream.append(self._redis, self._vo, data, kept=_KEPT, ttl_seconds=_TTL_SECONDS))


async def read_audit(
    redis: Redis, limit: int = 100, before: str | None = None, *, vo: str | None = None
) -> list[AuditEntry]:
    """The last actions, newest first.

    Args:
        before: only entries older than the one of this id.
        vo: what the members of this VO did; None: what administrators did.

    Raises:
        redis.exceptions.RedisError: when the server does not answer, or `before` is no id.
    """
    newest = f"({before}" if before else "+"
    ends: dict[str, dict[str, str]] = {}
    found: list[AuditEntry] = []
    if before:
        # Of an action that took its time, what came of it is newer than actions of the page before.
        ends.update(await _ends(redis, vo, before))
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
    """A page of the last actions, newest first. Arguments and errors as of `read_audit`.

    Raises:
        ValueError: when `after` is not from a page before.
    """
    found = await read_audit(redis, limit + 1, None if after is None else place_in_stream(after), vo=vo)
    return Page(items=found[:limit], after=found[limit - 1].id if len(found) > limit else None)


async def _ends(redis: Redis, vo: str | None, since: str) -> dict[str, dict[str, str]]:
    rows = await audit_stream.entries(redis, vo, since, 1000)
    return {data["of"]: data for _, data in _decoded(rows) if "of" in data}


def _decoded(rows: Sequence[Any]) -> list[tuple[str, dict[str, str]]]:
    # Other processes write here, and of other versions: what cannot be read is left out.
    found = []
    for entry, fields in rows:
        try:
            data = json.loads(fields[b"data"])
        except (KeyError, ValueError):
            continue
        found.append((_text(entry), {str(name): str(value) for name, value in data.items()}))
    return found


def _entry(entry: str, data: dict[str, str], end: dict[str, str]) -> AuditEntry:
    return AuditEntry(
        id=entry,
        at=datetime.fromtimestamp(int(entry.split("-", maxsplit=1)[0]) / 1000, UTC),
        who=data.get("who", "?"),
        via=data.get("via", "?"),
        action=data.get("action", "?"),
        target=data.get("target", ""),
        outcome=end.get("outcome"),
        ok={"1": True, "0": False}.get(end.get("ok", "")),
    )


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
