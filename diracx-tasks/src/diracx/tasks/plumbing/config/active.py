"""Active configuration of each process in Redis, written by `ConfigWatcher`, shown by `config in-force`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from redis.asyncio import Redis

from ..broker.inspection import server_time
from ..broker.running_configs import CONFIG_IN_FORCE, announce, announcements
from ..broker.stored import moment_of, reading, typed
from . import TasksConfig

#: A process that has not published its configuration for longer is regarded as ended.
COUNTS_SECONDS = 60.0
#: Interval at which a process publishes an unchanged configuration.
_REPEAT_SECONDS = 25.0
#: Maximum number and length of published problems; the log has all.
_PROBLEMS = 20
_PROBLEM_LENGTH = 500


@dataclass(frozen=True, slots=True)
class ActiveConfig:
    """Active configuration of one process."""

    role: str
    """`worker small`, `worker medium`, `worker large` or `scheduler`."""
    source: str
    """Source of the settings: a path, `Systems.Tasks`, or `defaults`."""
    digest: str
    """12 hexadecimal digits; equal for equal settings."""
    since: float
    """Time at which it came into force (s since the epoch, clock of the process)."""
    vos: tuple[str, ...] | None = None
    """The VOs; None without a DiracX configuration."""
    problems: tuple[str, ...] = ()
    """Mistakes in the current configuration; if there are any, an earlier one is in force."""
    problems_since: float | None = None
    """Time at which they appeared (s since the epoch)."""
    warnings: tuple[str, ...] = ()
    """Mistakes that do not prevent a configuration from coming into force."""
    process: str = ""
    """`host:pid:random`."""
    seen: float = 0.0
    """Time of the last publication (s since the epoch, clock of the server)."""

    def as_dict(self) -> dict[str, Any]:
        """Convert it for JSON, with times as ISO 8601 in UTC."""
        found = asdict(self)
        for name in ("since", "problems_since", "seen"):
            if found[name] is not None:
                found[name] = moment_of(found[name]).isoformat(timespec="milliseconds")
        return found


def digest(config: TasksConfig) -> str:
    """Return a short hash of settings, independent of their order and source."""
    written = json.dumps(config.model_dump(mode="json", exclude_unset=True), sort_keys=True)
    return hashlib.sha256(written.encode()).hexdigest()[:12]


class ActiveConfigPublisher:
    """Publishes the active configuration of this process in Redis."""

    def __init__(self, redis: Redis, process: str) -> None:
        self._redis = redis
        self._process = process
        self._published: str | None = None
        self._repeat_at = 0.0
        self._tidy_at = 0.0

    async def publish(self, in_force: ActiveConfig) -> None:
        """Publish it if it is new, or was published some time ago."""
        shortened = replace(
            in_force, problems=_shortened(in_force.problems), warnings=_shortened(in_force.warnings)
        )
        content = asdict(shortened)
        del content["process"], content["seen"]
        text = json.dumps(content)
        now = time.monotonic()
        if text == self._published and now < self._repeat_at:
            return
        tidy = now >= self._tidy_at
        await announce(self._redis, self._process, text, _COUNTS_MS, tidy)
        self._published, self._repeat_at = text, now + _REPEAT_SECONDS
        if tidy:
            self._tidy_at = now + COUNTS_SECONDS

    async def remove(self) -> None:
        """Remove the configuration of this process."""
        await announce(self._redis, self._process, "", _COUNTS_MS, tidy=False)


_COUNTS_MS = int(COUNTS_SECONDS * 1000)


def _shortened(lines: tuple[str, ...]) -> tuple[str, ...]:
    shown = tuple(line[:_PROBLEM_LENGTH] for line in lines[:_PROBLEMS])
    return shown if len(lines) <= _PROBLEMS else (*shown, f"… and {len(lines) - _PROBLEMS} more")


async def active_configs(redis: Redis) -> list[ActiveConfig]:
    """Return the active configuration of each live worker and scheduler, by role and process."""
    now = await server_time(redis)
    announced = await announcements(redis)
    found = []
    with reading(CONFIG_IN_FORCE):
        for process, value in announced.items():
            seen_ms, _, text = value.partition(" ")
            seen = int(seen_ms) / 1000
            if now - seen > COUNTS_SECONDS:
                continue
            found.append(typed(ActiveConfig, json.loads(text) | {"process": process, "seen": seen}))
        return sorted(found, key=lambda entry: (entry.role, entry.process))


def notes_of(entries: Sequence[ActiveConfig]) -> Iterator[tuple[str, str, list[str]]]:
    """Iterate over `problems` and `warnings`: this kind, the text, and the processes that have it."""
    for kind in ("problems", "warnings"):
        lines: dict[str, list[str]] = {}
        for entry in entries:
            for line in getattr(entry, kind):
                lines.setdefault(line, []).append(entry.process)
        yield from ((kind, line, processes) for line, processes in lines.items())
