"""Record in Redis of the configuration of each process, for everybody to read.

`diracx-task-run config in-force` and dashboards read it; `ConfigWatcher` writes it.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from redis.asyncio import Redis

from ..broker.inspection import server_time
from ..broker.running_configs import CONFIG_IN_FORCE, announce, announcements
from ..broker.stored import reading
from . import TasksConfig

#: A process that has not said so for longer runs no more.
COUNTS_SECONDS = 60.0
#: How often a process says so when nothing changes.
_REPEAT_SECONDS = 25.0
#: Problems, and characters of each, that are published; the log has them all.
_PROBLEMS = 20
_PROBLEM_LENGTH = 500


@dataclass(frozen=True, slots=True)
class ActiveConfig:
    """The configuration that one process runs with."""

    role: str
    """`worker small`, `worker medium`, `worker large` or `scheduler`."""
    source: str
    """Source of the settings: a path, `Systems.Tasks`, or `defaults`."""
    digest: str
    """12 hexadecimal digits; the same for the same settings of tasks."""
    since: float
    """Time when it came into force (s since the epoch, the clock of the process)."""
    vos: tuple[str, ...] | None = None
    """The VOs that the process knows; None without a DiracX configuration."""
    problems: tuple[str, ...] = ()
    """Mistakes in the configuration as it is written now: the one in force is then an earlier one."""
    problems_since: float | None = None
    """Time when they appeared (s since the epoch)."""
    warnings: tuple[str, ...] = ()
    """Mistakes in it that did not keep it from coming into force."""
    process: str = ""
    """`host:pid:random`."""
    seen: float = 0.0
    """Time when the process last said so (s since the epoch, the clock of the server)."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON: moments as ISO 8601 in UTC."""
        found = asdict(self)
        for name in ("since", "problems_since", "seen"):
            if found[name] is not None:
                found[name] = datetime.fromtimestamp(found[name], UTC).isoformat(timespec="milliseconds")
        return found


def digest(config: TasksConfig) -> str:
    """A short name for these settings, the same wherever and in whatever order they were read."""
    written = json.dumps(config.model_dump(mode="json", exclude_unset=True), sort_keys=True)
    return hashlib.sha256(written.encode()).hexdigest()[:12]


class Announcer:
    """Says with which configuration this process runs."""

    def __init__(self, redis: Redis, process: str) -> None:
        self._redis = redis
        self._process = process
        self._said: str | None = None
        self._repeat_at = 0.0
        self._tidy_at = 0.0

    async def say(self, in_force: ActiveConfig) -> None:
        """Say it, if it is new or was said long ago.

        Raises:
            redis.exceptions.RedisError: when the server does not answer.
        """
        shortened = replace(
            in_force, problems=_shortened(in_force.problems), warnings=_shortened(in_force.warnings)
        )
        content = asdict(shortened)
        del content["process"], content["seen"]
        said = json.dumps(content)
        now = time.monotonic()
        if said == self._said and now < self._repeat_at:
            return
        tidy = now >= self._tidy_at
        await announce(self._redis, self._process, said, _COUNTS_MS, tidy)
        self._said, self._repeat_at = said, now + _REPEAT_SECONDS
        if tidy:
            self._tidy_at = now + COUNTS_SECONDS

    async def leave(self) -> None:
        """Say that the process runs no more.

        Raises:
            redis.exceptions.RedisError: when the server does not answer; it is forgotten by itself then.
        """
        await announce(self._redis, self._process, "", _COUNTS_MS, tidy=False)


_COUNTS_MS = int(COUNTS_SECONDS * 1000)


def _shortened(lines: tuple[str, ...]) -> tuple[str, ...]:
    shown = tuple(line[:_PROBLEM_LENGTH] for line in lines[:_PROBLEMS])
    return shown if len(lines) <= _PROBLEMS else (*shown, f"… and {len(lines) - _PROBLEMS} more")


async def active_configs(redis: Redis) -> list[ActiveConfig]:
    """With which configuration each living worker and scheduler runs, by role and process.

    Raises:
        redis.exceptions.RedisError: when the server does not answer.
        UnreadableKeyError: when something else was written there.
    """
    now = await server_time(redis)
    announced = await announcements(redis)
    found = []
    with reading(CONFIG_IN_FORCE):
        for process, value in announced.items():
            seen_ms, _, text = value.partition(" ")
            seen = int(seen_ms) / 1000
            if now - seen > COUNTS_SECONDS:
                continue
            content = json.loads(text)
            for name in ("problems", "warnings", "vos"):
                if content.get(name) is not None:
                    content[name] = tuple(content[name])
            known = {name: value for name, value in content.items() if name in ActiveConfig.__slots__}
            found.append(ActiveConfig(**known | {"process": process, "seen": seen}))
        return sorted(found, key=lambda entry: (entry.role, entry.process))
