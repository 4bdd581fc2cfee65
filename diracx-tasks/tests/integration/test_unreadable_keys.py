"""Unreadable keys of operators are reported by name, and never as a traceback."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from diracx.tasks.cli.errors import CliError
from diracx.tasks.cli.runtime.server import explained_redis
from diracx.tasks.operations import failures, history, running, snapshot, stats, workers
from diracx.tasks.operations.health import HealthChecks
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.stored import UnreadableKeyError
from diracx.tasks.plumbing.config import TasksConfig
from diracx.tasks.plumbing.config.active import active_configs
from diracx.tasks.plumbing.config.reader import ConfigReader
from diracx.tasks.plumbing.messages.codec import dumps
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.scheduler.overview import schedules
from diracx.tasks.web.auth.backends import Principal, Role, TokenBackend
from diracx.tasks.web.context import AppContext
from diracx.tasks.web.dashboard import DashboardApp
from redis.asyncio import Redis

_PAGES = ("/workers", "/running", "/tasks", "/failures", "/schedules", "/configuration")
_WORKER = "host:1:ab"
_REPORT = keys.REPORT_PREFIX + _WORKER
_OTHER_FIELDS = '{now} {{"of": "a later version"}}'


def _listed(redis: Redis) -> Awaitable[Any]:
    return schedules(redis, {}, TasksConfig(), [])


async def _write(redis: Redis, key: str, field: str, value: bytes | str) -> None:
    now = int(time.time() * 1000)
    await redis.zadd(keys.REPORTING, {_WORKER: now})
    await redis.zadd(keys.ALIVE, {_WORKER: now + 60_000})
    if isinstance(value, str):
        value = value.format(now=now)
    if key == keys.FAILURES:
        await redis.xadd(key, {"data": value})
    else:
        await redis.hset(key, field, value)
        await redis.expire(key, 3600)


READERS: list[tuple[str, str, bytes | str, Callable[[Redis], Awaitable[Any]]]] = [
    (_REPORT, "line", b"rubbish", workers),
    (_REPORT, "line", dumps(["a list"]), workers),
    (_REPORT, "line", dumps({"slots": "many"}), workers),
    (_REPORT, "blocked", dumps({"of": "a later version"}), workers),
    (_REPORT, "running", dumps([{"of": "a later version"}]), running),
    (_REPORT, "running", dumps([{"task_id": "1", "since": 1.5}]), running),
    (keys.MINUTE_PREFIX + "{minute}", "test:Task", b"rubbish", stats),
    (keys.MINUTE_PREFIX + "{minute}", "test:Task", dumps({"done": "many"}), stats),
    (keys.MINUTE_PREFIX + "{minute}", "test:Task", dumps({"done": float("nan")}), history),
    (keys.FAILURES, "", dumps({"of": "a later version"}), failures),
    (keys.OUTCOMES, "test:Task", _OTHER_FIELDS, _listed),
    (keys.LAST_RUNS, "test:Task", "rubbish", _listed),
    (keys.PAUSED, "test:Task", "rubbish", _listed),
    (keys.CONFIG_IN_FORCE, "p", _OTHER_FIELDS, active_configs),
    (keys.CONFIG_IN_FORCE, "p", "{now} " + "[" * 3000, active_configs),
    (
        keys.CONFIG_IN_FORCE,
        "p",
        '{now} {{"role": "worker", "source": "s", "digest": "d", "since": "now"}}',
        active_configs,
    ),
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


@pytest.mark.leaves_keys("diracx:*")
async def test_an_outcome_of_a_later_version_is_listed_as_it_is(redis: Redis) -> None:
    failure = {"task_id": "t", "task_name": "a:Task", "vo": "lhcb", "type": "E", "message": "", "traceback": ""}
    failure |= {"at": 1.5, "attempt": 1, "worker": _WORKER, "outcome": "parked", "later": "field"}
    await redis.xadd(keys.FAILURES, {"data": dumps(failure)})
    assert [each.outcome for each in (await failures(redis)).items] == ["parked"]


async def test_next_runs_at_the_ends_of_time_are_listed(redis: Redis) -> None:
    await redis.zadd(keys.NEXT_RUNS, {"never": float("inf"), "always": float("-inf"), "far": 5e15})
    assert [state.id for state in await _listed(redis)] == ["always", "far", "never"]
    await redis.delete(keys.NEXT_RUNS)


@pytest.mark.leaves_keys("diracx:*")
async def test_numbers_that_cannot_be_read_count_as_0_and_times_are_limited(redis: Redis) -> None:
    await redis.zadd(keys.DELAYED, {"a task": float("-inf")})
    await redis.hset(keys.DELAYED_REASONS, mapping={"retry": b"\xff", "lock": "nan", b"\xff": "1", "rate": "²"})
    await redis.zadd(keys.NEXT_RUNS, {"test:Task": float("-inf")})
    await redis.set(keys.LEADER, "a scheduler", ex=60)
    await redis.hset(f"{keys.THROUGHPUT_PREFIX}{int(time.time() // 60)}", "realtime:small length", "rubbish")
    health = await HealthChecks(redis).run()
    assert {"delayed_overdue", "schedules_late"} <= {alert.check for alert in health.alerts}
    seen = await snapshot(redis)
    assert set(seen.delayed.values()) == {0}
    assert json.dumps([seen.as_json(), [point.as_json() for point in await history(redis)]], allow_nan=False)


@pytest.mark.parametrize(("field", "value"), [("line", b"rubbish"), ("running", dumps([{"since": 1.5}]))])
async def test_the_health_checks_name_the_key(
    field: str, value: bytes, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await _write(redis, _REPORT, field, value)
    [alert] = (await HealthChecks(redis).run()).alerts
    assert alert.check == "server_unreadable"
    assert _REPORT in alert.summary
    assert "traceback" not in alert.remedy
    assert caplog.text == ""
    await redis.delete(keys.REPORTING, keys.ALIVE, _REPORT)


@pytest.mark.leaves_keys("diracx:*")
@pytest.mark.parametrize(("key", "field", "value", "read"), READERS)
async def test_the_overview_is_there_and_pages_name_the_key(
    key: str, field: str, value: bytes | str, read: object, redis: Redis, redis_url: str
) -> None:
    key = key.format(minute=int(time.time() // 60))
    await _write(redis, key, field, value)
    broker = RedisStreamBroker(redis_url)

    async def context() -> AppContext:
        return AppContext(broker, TaskRegistry.of({}), ConfigReader())

    backend = TokenBackend({"the-token-of-wilma": Principal("wilma", Role.WRITE, None)}, "")
    app = DashboardApp(context, backend, extensions=[])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        await client.post("/sign-in", data={"credential": "the-token-of-wilma"})
        responses = [await client.get(page) for page in ("/", *_PAGES)]
    await app.aclose()
    await broker.shutdown()
    assert responses[0].status_code == 200
    assert {response.status_code for response in responses} <= {200, 503}
    assert any(key in html.unescape(response.text) for response in responses)
