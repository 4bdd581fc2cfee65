"""Health checks: their alerts on a real server, start times and costs."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgpack
import pytest
from diracx.tasks.operations import stats
from diracx.tasks.operations.health import Alert, Health, HealthChecks, HealthThresholds, Severity, health_checks
from diracx.tasks.operations.health.checks import CHECKS
from diracx.tasks.operations.health.runner import DEAD_LETTERS
from diracx.tasks.operations.metrics import health_metrics
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.models import submit_task
from diracx.tasks.plumbing.broker.server_check import EMBEDDED
from diracx.tasks.plumbing.config.active import ActiveConfig, ActiveConfigPublisher
from diracx.tasks.plumbing.exceptions import TaskConfigError
from diracx.tasks.plumbing.messages.codec import dumps
from diracx.tasks.plumbing.persistence import DeadLetter, TaskDB
from diracx.tasks.plumbing.worker.reporter import REJECTED
from redis.asyncio import Redis
from support.paths import ROOT
from support.waiting import until

pytestmark = pytest.mark.leaves_keys("diracx:*")
WORKER = "wn1.example.org:7:aa"
REPLICAS: list[asyncio.StreamWriter] = []


@pytest.fixture
async def broker(redis_url: str) -> AsyncIterator[RedisStreamBroker]:
    made = RedisStreamBroker(redis_url)
    yield made
    await made.shutdown()


def ms(ago: float = 0.0) -> int:
    return int((time.time() - ago) * 1000)


async def a_worker(
    redis: Redis, *, size: str = "medium", seen: float = 0.0, lease: float = 60.0, **report: Any
) -> None:
    """A worker in Redis: its last report, and the end of its lease."""
    await redis.zadd(keys.ALIVE, {WORKER: ms(-lease)})
    await redis.zadd(keys.REPORTING, {WORKER: ms(seen)})
    line = {"size": size, "slots": 10, "slots_used": 1, "started": time.time() - 900}
    fields = {"line": line, **report}
    await redis.hset(keys.REPORT_PREFIX + WORKER, mapping={name: dumps(value) for name, value in fields.items()})


def running(**changes: Any) -> dict[str, Any]:
    return {
        "task_id": "t1",
        "task_name": "test:Copy",
        "vo": None,
        "stream": "diracx:tasks:normal:medium",
        "entry": "1-0",
        "deliveries": 1,
        "attempt": 1,
        "since": time.time() - 1000,
        "locks": [],
        **changes,
    }


async def waiting(redis: Redis, number: int, ago: float, stream: str = "diracx:tasks:normal:medium") -> None:
    for position in range(number):
        await redis.xadd(stream, {"data": b"x"}, id=f"{ms(ago)}-{position}")


async def ended(redis: Redis, task: str, **counters: int) -> None:
    await redis.hset(f"{keys.MINUTE_PREFIX}{int(time.time()) // 60}", task, msgpack.packb(counters))


async def rejected(redis: Redis, reason: str) -> None:
    await ended(redis, REJECTED, dead=1, failed=1)
    failure = {"at": time.time() - 60, "task_id": "t", "task_name": "old:Gone", "vo": None, "type": reason}
    failure |= {"message": "no", "traceback": "", "attempt": 1, "worker": WORKER, "outcome": "dead"}
    await redis.xadd(keys.FAILURES, {"data": dumps(failure)})


async def a_schedule(redis: Redis, late: float) -> None:
    await redis.zadd(keys.NEXT_RUNS, {"test:Tick": ms(late)})


# --- states, each with what is said of it -------------------------------------------------------------------


async def no_worker(redis: Redis) -> None:
    await waiting(redis, 3, 300)


async def growing(redis: Redis) -> None:
    await a_worker(redis)
    await waiting(redis, 1_200, 120, "diracx:tasks:background:medium")
    minute = int(time.time()) // 60
    noted = {"at": ms(180), "diracx:tasks:background:medium added": 0}
    await redis.hset(f"{keys.THROUGHPUT_PREFIX}{minute - 3}", mapping=noted)


async def long_wait(redis: Redis) -> None:
    await a_worker(redis)
    await waiting(redis, 1, 1500)


async def no_leader(redis: Redis) -> None:
    await a_schedule(redis, 400)


async def late_schedules(redis: Redis) -> None:
    await redis.set(keys.LEADER, "another", ex=60)
    await a_schedule(redis, 400)


async def schedule_off(redis: Redis) -> None:
    await redis.hset(keys.PROBLEMS, "test:Tick", "its arguments do not fit")


async def overdue(redis: Redis) -> None:
    await redis.zadd(keys.DELAYED, {"t1": ms(200)})


async def blocked(redis: Redis) -> None:
    stuck = {"since": time.time() - 500, "task_id": "t1", "task_name": "test:Copy", "stack": "time.sleep"}
    await a_worker(redis, seen=130, blocked=stuck)


async def silent(redis: Redis) -> None:
    await a_worker(redis, seen=600)


async def dead(redis: Redis) -> None:
    await a_worker(redis, seen=60, lease=-1)  # with a poison candidate, its lease starts again and again


async def past_limit(redis: Redis) -> None:
    await a_worker(redis, running=[running(overdue_since=time.time() - 70)])


async def poison_candidate(redis: Redis) -> None:
    await a_worker(redis, running=[running(deliveries=3)])


async def lock_held(redis: Redis) -> None:
    await a_worker(redis, running=[running(task_id="it's; now", locks=[["lock:mutex:site:one", "me"]])])
    await redis.zadd(keys.WAITING_PREFIX + "small:lock:mutex:site:one", {"t2": 1.0, "t3": 2.0})


async def half_fails(redis: Redis) -> None:
    await ended(redis, "test:Copy", done=5, failed=7)


async def all_fails(redis: Redis) -> None:
    await ended(redis, "test:Copy", failed=26)


async def dead_letters_wait(redis: Redis) -> None:
    for number in range(3):
        stored = DeadLetter(task_id=f"t{number}", task_name="test:Copy", reason="exhausted", detail="", data=b"")
        await redis.xadd(keys.DEAD_LETTERS, stored.to_stored(), id=f"{ms(900)}-{number}")


async def stuck_group(redis: Redis) -> None:
    await redis.zadd(keys.GROUPS, {"g1": ms(-5 * 86400), "fresh": ms(-7 * 86400), "submitting": ms(-500)})


async def wrong_configuration(redis: Redis) -> None:
    since = time.time() - 700
    entry = ActiveConfig(
        "worker small", "tasks.yaml", "aaa", since, problems=("line 3: no such task",), problems_since=since
    )
    await ActiveConfigPublisher(redis, WORKER).publish(entry)


async def two_configurations(redis: Redis) -> None:
    for digest, since in (("aaa", 4000), ("bbb", 300)):
        await ActiveConfigPublisher(redis, digest).publish(
            ActiveConfig("worker small", "tasks.yaml", digest, time.time() - since)
        )


async def memory_short(redis: Redis) -> None:
    used = (await redis.info("memory"))["used_memory"]
    await redis.config_set("maxmemory", int(used * 1.05))


async def evicting(redis: Redis) -> None:
    await redis.config_set("maxmemory", 1 << 30)
    await redis.config_set("maxmemory-policy", "allkeys-lru")


async def not_persistent(redis: Redis) -> None:
    await redis.config_set("availability-zone", "")  # or it says that it loses data on purpose


async def replicated(redis: Redis) -> None:
    at = redis.connection_pool.connection_kwargs
    _, writer = await asyncio.open_connection(at["host"], at["port"])
    writer.write(b"SYNC\r\n")
    REPLICAS.append(writer)
    await until(lambda: redis.info("replication"), when=lambda found: found["connected_slaves"] == 1)


async def demoted(redis: Redis) -> None:
    await redis.config_set("replica-read-only", "no")
    await redis.replicaof("127.0.0.1", "1")


STATES: dict[str, tuple[Callable[[Redis], Awaitable[None]], str, Severity, int, float | None, str]] = {
    # state: (how to get there, check, severity, how many, since how many seconds ago, what is said)
    "no worker": (no_worker, "queue_without_worker", Severity.CRITICAL, 3, 300, "no worker of size medium runs"),
    "growing": (growing, "backlog", Severity.WARNING, 1_200, 120, "the backlog grows by"),
    "long wait": (long_wait, "backlog", Severity.WARNING, 1, 1500, "the first for 25 min"),
    "no leader": (no_leader, "no_scheduler", Severity.CRITICAL, 1, 400, "1 schedule is not submitted"),
    "late": (late_schedules, "schedules_late", Severity.CRITICAL, 1, 400, "1 schedule is late"),
    "schedule off": (schedule_off, "schedules_failing", Severity.CRITICAL, 1, None, "its arguments do not fit"),
    "overdue": (overdue, "delayed_overdue", Severity.CRITICAL, 1, 200, "1 delayed task is overdue"),
    "blocked": (blocked, "worker_blocked", Severity.CRITICAL, 1, 500, "test:Copy t1 blocks its event loop"),
    "silent": (silent, "worker_silent", Severity.CRITICAL, 1, 600, "has not reported for 10 min"),
    "dead": (dead, "workers_dead", Severity.WARNING, 1, 60, "1 worker is dead"),
    "past limit": (past_limit, "tasks_overdue", Severity.WARNING, 1, 70, "continues after its time limit"),
    "poison candidate": (poison_candidate, "poison_candidates", Severity.WARNING, 3, 1000, "delivered 3 times"),
    "lock": (lock_held, "locks_held", Severity.WARNING, 2, 1000, "2 tasks wait for it"),
    "half fails": (half_fails, "tasks_failing", Severity.WARNING, 7, None, "test:Copy fails in 58%"),
    "all fails": (all_fails, "tasks_failing", Severity.CRITICAL, 26, None, "26 of 26"),
    "unknown task": (
        lambda redis: rejected(redis, "unknown task"),
        "messages_rejected",
        Severity.WARNING,
        1,
        60,
        "could not be executed (unknown task): old:Gone",
    ),
    "poison": (lambda redis: rejected(redis, "poison"), "messages_rejected", Severity.CRITICAL, 1, 60, "(poison)"),
    "dead letters": (
        dead_letters_wait,
        "dead_letters_waiting",
        Severity.WARNING,
        3,
        900,
        "3 dead letters wait in Redis",
    ),
    "group": (stuck_group, "groups_stuck", Severity.WARNING, 1, None, "1 callback group"),
    "wrong configuration": (
        wrong_configuration,
        "configuration",
        Severity.CRITICAL,
        1,
        700,
        "1 process uses an earlier configuration",
    ),
    "two configurations": (two_configurations, "configuration", Severity.WARNING, 2, 300, "2 different"),
    "memory": (memory_short, "memory", Severity.CRITICAL, 1, None, "% of its memory"),
    "no persistence": (
        not_persistent,
        "persistence",
        Severity.WARNING,
        1,
        None,
        "keeps no append-only file: its restart loses accepted tasks",
    ),
    "replica": (replicated, "replication", Severity.WARNING, 1, None, "min-replicas-to-write or"),
    "demoted": (demoted, "server_unusable", Severity.CRITICAL, 1, None, "is a replica, which takes no writes"),
    "eviction": (evicting, "eviction", Severity.CRITICAL, 1, None, "maxmemory-policy allkeys-lru"),
}


@pytest.fixture
async def _limits_of_the_server(redis: Redis) -> AsyncIterator[None]:
    yield
    await redis.config_set("maxmemory", 0)
    await redis.config_set("maxmemory-policy", "noeviction")
    await redis.config_set("availability-zone", EMBEDDED)
    await redis.config_set("replica-read-only", "yes")
    await redis.config_set("min-replicas-to-write", 0)
    await redis.replicaof("NO", "ONE")
    while REPLICAS:
        REPLICAS.pop().close()


def test_every_check_with_its_remedy_and_every_limit_is_in_the_reference() -> None:
    text = (ROOT / "docs/reference/health.md").read_text()
    others = (
        "dead_letters_open",
        "server_away",
        "server_unreadable",
        "source_away",
        "ce_banned",
        "ce_circuit_open",
        "ce_pilots_failing",
        "ce_pilots_missing",
    )
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE))
    assert set(rows) == {*CHECKS, *others}
    assert all(len(remedy) > 10 for remedy in rows.values())
    limits = HealthThresholds.model_fields.items()
    rows = [f"| `DIRACX_TASKS_HEALTH_{name.upper()}` | {field.default:g} |" for name, field in limits]
    assert [row for row in rows if row not in text] == []


def test_every_health_check_has_a_state_with_an_alert() -> None:
    assert {state[1] for state in STATES.values()} == set(CHECKS)


@pytest.mark.usefixtures("_limits_of_the_server")
@pytest.mark.parametrize("name", STATES)
async def test_an_alert_has_severity_number_since_when_and_remedy(redis: Redis, name: str) -> None:
    bring_about, check, severity, count, ago, expected = STATES[name]
    assert (await HealthChecks(redis).run()).alerts == [], "before that all is well"
    await bring_about(redis)
    health = await HealthChecks(redis).run()
    [alert] = health.alerts
    assert (alert.check, alert.severity, alert.count) == (check, severity, count)
    assert health.severity is severity
    assert expected in alert.summary
    assert alert.remedy
    commands = alert.remedy.split("`")[1::2]
    assert all(";" not in command or "it's; now" in shlex.split(command) for command in commands)
    assert alert.since is not None
    assert (datetime.now(UTC) - alert.since).total_seconds() == pytest.approx(ago or 0, abs=20)
    labels = {"check": check, "severity": str(severity), "subject": alert.subject}
    [sample] = [
        each for metric in health_metrics(health) for each in metric.samples if each.name == "health_alerts"
    ]
    assert (sample.labels, sample.value) == (labels, count)
    assert json.dumps(health.as_json())


# --- since when ---------------------------------------------------------------------------------------------


async def test_the_start_of_an_alert_is_shared_and_reset_after_a_recovery(redis: Redis) -> None:
    async def since(checks: HealthChecks) -> datetime | None:
        [alert] = (await checks.run()).alerts
        return alert.since

    await schedule_off(redis)
    one, another = HealthChecks(redis), HealthChecks(redis)
    first = await since(one)
    assert first is not None
    assert await since(another) == await since(one) == first
    await redis.delete(keys.PROBLEMS)
    assert (await one.run()).alerts == []
    await schedule_off(redis)
    second = await since(another)
    assert second is not None
    assert second > first


async def test_checks_of_fewer_sources_do_not_reset_the_alerts_of_others(redis: Redis) -> None:
    async def failing_check() -> list[Alert]:
        return [Alert(check="ce_banned", severity=Severity.WARNING, summary="x", remedy="y", subject="ce1")]

    whole, blind = HealthChecks(redis, {"pilots": failing_check}), HealthChecks(redis)
    [before] = (await whole.run()).alerts
    assert (await blind.run()).alerts == []
    [after] = (await whole.run()).alerts
    assert before.since == after.since is not None


# --- servers that are away ----------------------------------------------------------------------------------


async def test_an_unavailable_server_is_an_alert_with_its_reason() -> None:
    async with Redis.from_url("redis://127.0.0.1:1") as unavailable:
        health = await HealthChecks(unavailable).run()
    assert health.snapshot is None
    [alert] = health.alerts
    assert (alert.check, alert.severity) == ("server_away", Severity.CRITICAL)
    assert "127.0.0.1:1" in alert.summary


@pytest.mark.usefixtures("_limits_of_the_server")
async def test_a_server_that_refuses_writes_is_an_alert_with_its_reason(redis: Redis) -> None:
    await redis.config_set("min-replicas-to-write", 1)  # as when its disk is full
    [alert] = (await HealthChecks(redis).run()).alerts
    assert (alert.check, alert.severity) == ("server_unusable", Severity.CRITICAL)
    assert "refuses writes: NOREPLICAS" in alert.summary


async def test_tasks_that_waited_for_no_time_at_all_can_be_counted(redis: Redis) -> None:
    await ended(redis, "test:Copy", done=2, r0=2, q0=2)
    [each] = await stats(redis)
    assert (each.run.mean_seconds, each.queue.mean_seconds) == (0, 0)
    assert (await HealthChecks(redis).run()).alerts == []


def test_an_alert_is_one_printable_line_for_any_names() -> None:
    alert = Alert(check="x", severity=Severity.WARNING, summary="a\x1b[31m\r\nb\u202ec\u2028d", remedy="none")
    assert alert.summary == "a�[31m b�c d"


async def test_unreadable_data_in_redis_is_an_alert_without_a_traceback(redis: Redis) -> None:
    await redis.hset(keys.CONFIG_IN_FORCE, "another", "rubbish")
    health = await HealthChecks(redis).run()
    [alert] = health.alerts
    assert (alert.check, alert.severity) == ("server_unreadable", Severity.UNKNOWN)


async def test_dead_letters_are_counted_and_an_unavailable_database_hides_nothing_else(
    redis: Redis, tmp_path: Path
) -> None:
    db = TaskDB(f"sqlite+aiosqlite:///{tmp_path}/task.db")
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(db.engine_context())
        checks = await stack.enter_async_context(health_checks(redis, db))
        await schedule_off(redis)
        health = await checks.run()
        assert {alert.check: alert.severity for alert in health.alerts} == {
            "schedules_failing": Severity.CRITICAL,
            "source_away": Severity.UNKNOWN,
        }
        assert "not initialised" in next(alert.summary for alert in health.alerts if alert.subject == DEAD_LETTERS)
        async with db.engine.begin() as connection:
            await connection.run_sync(db.metadata.create_all)
        stored = DeadLetter(task_id="t", task_name="test:Copy", reason="exhausted", detail="", data=b"")
        async with db:
            await db.insert(stored)
        again = await stack.enter_async_context(health_checks(redis, db))
        [open_dead_letters] = [each for each in (await again.run()).alerts if each.check == "dead_letters_open"]
        assert (open_dead_letters.count, open_dead_letters.severity) == (1, Severity.WARNING)
        assert open_dead_letters.since is not None
        assert datetime.now(UTC) - open_dead_letters.since < timedelta(minutes=1)


async def test_checks_that_were_left_out_are_named(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DIRACX_DB_URL_MYPILOTDB", "DIRACX_DB_URL_TASKDB"):
        monkeypatch.delenv(name, raising=False)
    async with health_checks(redis, None) as checks:
        health = await checks.run()
    assert health.severity is Severity.OK
    assert any("DIRACX_DB_URL_TASKDB is not set here" in line for line in health.unchecked)


# --- thresholds and cost ------------------------------------------------------------------------------------


async def test_a_threshold_is_set_in_the_environment(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    await half_fails(redis)
    monkeypatch.setenv("DIRACX_TASKS_HEALTH_FAILURE_ATTEMPTS", "13")
    async with health_checks(redis, None) as checks:
        assert (await checks.run()).alerts == []
    monkeypatch.setenv("DIRACX_TASKS_HEALTH_FAILURE_ATTEMPTS", "many")
    with pytest.raises(TaskConfigError, match="DIRACX_TASKS_HEALTH_FAILURE_ATTEMPTS='many'"):
        HealthThresholds.from_environment()


async def test_health_checks_cost_the_same_with_thousands_of_tasks_as_with_one(
    redis: Redis, broker: RedisStreamBroker
) -> None:
    async def commands() -> int:
        before = (await redis.info("stats"))["total_commands_processed"]
        await checks.run()
        return int((await redis.info("stats"))["total_commands_processed"]) - int(before)

    checks = HealthChecks(redis)
    await submit_task(broker, "test:Held", ["x"])
    await a_worker(redis, size="small")
    await commands()
    few = await commands()
    for number in range(1_000):
        await submit_task(broker, "test:Held", [number])
        await submit_task(broker, "test:Held", [number], run_at=datetime.now(UTC) + timedelta(hours=1))
    assert abs(await commands() - few) <= 2


def test_the_worst_alert_is_the_severity_of_the_whole() -> None:
    assert [severity.exit_code for severity in Severity] == [0, 1, 2, 3]
    order = sorted(Severity, key=lambda each: each.rank)
    assert order == [Severity.OK, Severity.WARNING, Severity.UNKNOWN, Severity.CRITICAL]
    assert Health().as_json()["alerts"] == []
