"""What another version, or something else, has written to a key for operators is named, and is no traceback."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from diracx.tasks.cli.errors import CliError, explained_redis
from diracx.tasks.monitor import failures, running, stats, workers
from diracx.tasks.monitor.health import HealthChecks
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.broker.stored import UnreadableKeyError
from diracx.tasks.plumbing.config import TasksConfig
from diracx.tasks.plumbing.in_force import configurations_in_force
from diracx.tasks.plumbing.scheduler.overview import schedules
from diracx.tasks.plumbing.wire import dumps
from redis.asyncio import Redis

_WORKER = "host:1:ab"
_REPORT = keys.REPORT_PREFIX + _WORKER
_NOW_MS = int(time.time() * 1000)
_OTHER_FIELDS = json.dumps({"of": "a later version"})


def _listed(redis: Redis) -> Awaitable[Any]:
    return schedules(redis, {}, TasksConfig(), [])


async def _write(redis: Redis, key: str, field: str, value: bytes | str) -> None:
    await redis.zadd(keys.REPORTING, {_WORKER: _NOW_MS})
    await redis.zadd(keys.ALIVE, {_WORKER: _NOW_MS + 60_000})
    if key == keys.FAILURES:
        await redis.xadd(key, {"data": value})
    else:
        await redis.hset(key, field, value)
        await redis.expire(key, 3600)


READERS: list[tuple[str, str, bytes | str, Callable[[Redis], Awaitable[Any]]]] = [
    (_REPORT, "line", b"rubbish", workers),
    (_REPORT, "line", dumps(["a list"]), workers),
    (_REPORT, "blocked", dumps({"of": "a later version"}), workers),
    (_REPORT, "running", dumps([{"of": "a later version"}]), running),
    (keys.MINUTE_PREFIX + "{minute}", "test:Task", b"rubbish", stats),
    (keys.FAILURES, "", dumps({"of": "a later version"}), failures),
    (keys.OUTCOMES, "test:Task", f"{_NOW_MS} {_OTHER_FIELDS}", _listed),
    (keys.LAST_RUNS, "test:Task", "rubbish", _listed),
    (keys.PAUSED, "test:Task", "rubbish", _listed),
    (keys.CONFIG_IN_FORCE, "p", f"{_NOW_MS} {_OTHER_FIELDS}", configurations_in_force),
]


@pytest.mark.leaves_keys("diracx:*")
@pytest.mark.parametrize(("key", "field", "value", "read"), READERS)
async def test_a_key_that_cannot_be_read_is_named_in_one_line(
    key: str,
    field: str,
    value: bytes | str,
    read: Callable[[Redis], Awaitable[Any]],
    redis: Redis,
) -> None:
    key = key.format(minute=int(time.time() // 60))
    await _write(redis, key, field, value)
    with pytest.raises(UnreadableKeyError, match=f"the key '{key}' holds what this version cannot read"):
        await read(redis)
    with pytest.raises(CliError, match=key), explained_redis("redis://here"):  # as every command reads it
        await read(redis)


async def test_the_health_checks_name_the_key(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    await _write(redis, _REPORT, "line", b"rubbish")
    [alert] = (await HealthChecks(redis).run()).alerts
    assert alert.check == "server_unreadable"
    assert _REPORT in alert.summary
    assert "traceback" not in alert.remedy
    assert caplog.text == ""
    await redis.delete(keys.REPORTING, keys.ALIVE, _REPORT)
