"""Simulated data of a night at a grid site, for pictures of the dashboard."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import cycle
from unittest.mock import patch

import msgpack
import yaml
from diracx.tasks.plumbing import (
    BaseLock,
    BaseTask,
    CallbackSpawner,
    ConcurrencyLimiter,
    CronSchedule,
    ExponentialBackoff,
    IntervalSeconds,
    MutexLock,
    NoRetry,
    PeriodicBaseTask,
    PeriodicVoAwareBaseTask,
    RateLimiter,
    register_locked_object_type,
)
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.broker.models import Submission, TaskMessage
from diracx.tasks.plumbing.broker.telemetry import bucket_of
from diracx.tasks.plumbing.config.active import ActiveConfig, ActiveConfigPublisher, digest
from diracx.tasks.plumbing.worker import reporter
from diracx.tasks.testing import TaskSystem
from diracx.tasks.web.context import AppContext, Load
from diracx.tasks.web.operator import Operator
from redis.asyncio import Redis

from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.outputs import Output
from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.exceptions import NoRoomError
from gubbins.domain.pilot_states import MyPilotStatus
from support.waiting import until

HOSTS = cycle(["wn042.example.org", "wn043.example.org"])
VOS = ["cta", "juno", "lhcb"]
SE = register_locked_object_type("storage_element")
USER = register_locked_object_type("sandbox_owner")
CONFIG = """\
common:
  transfers:CopyFile:
    max_retries: 8
    retry_base_delay_seconds: 30
    time_limit_seconds: 3600
  cleaning:RemoveSandboxes:
    periodic: {schedule: "30 3 * * *", timezone: Europe/Zurich}
vo_overrides:
  lhcb:
    accounting:Summarise:
      periodic: {interval_seconds: 300}
limits:
  storage_element:
    default: {concurrency_limit: 20}
    keys:
      CERN-EOS: {concurrency_limit: 100}
"""


class TransfersAtSE(ConcurrencyLimiter):
    """At most so many at a time."""

    limit = 20


class RequestsAtSE(RateLimiter):
    """At most so many in any minute."""

    limit = 100
    window_seconds = 60


@dataclass
class CopyFile(BaseTask):
    """Takes its time."""

    lfn: str
    target: str

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [TransfersAtSE(SE, self.target), RequestsAtSE(SE, self.target)]

    async def execute(self) -> None:
        await asyncio.sleep(3600)


@dataclass
class ReplicateDataset(BaseTask):
    """Many copies, and one word at their end."""

    dataset: str
    target: str

    async def execute(self, spawn: CallbackSpawner) -> str:
        copies: list[BaseTask] = [
            CopyFile(f"/lhcb/{self.dataset}/{number:08}.dst", self.target) for number in range(6)
        ]
        return await spawn([*copies, *[CheckFile(f"{number:08}") for number in range(18)]], Announce(self.dataset))


@dataclass
class CheckFile(BaseTask):
    """Is done at once."""

    name: str

    async def execute(self) -> None: ...


@dataclass
class Announce(BaseTask):
    """The word."""

    dataset: str

    async def execute(self) -> None: ...


@dataclass
class CleanSandbox(BaseTask):
    """One at a time for each owner."""

    owner: str

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(USER, self.owner)]

    async def execute(self) -> None:
        await asyncio.sleep(3600)


@dataclass
class Register(BaseTask):
    """Ends as a dead letter."""

    lfn: str
    token: str

    secret_fields = frozenset({"token"})
    retry_policy = NoRetry()
    dlq_eligible = True

    async def execute(self) -> None:
        raise ValueError(f"the catalogue has {self.lfn} already, with another GUID")


@dataclass
class Stage(BaseTask):
    """Is tried again later."""

    lfn: str
    retry_policy = ExponentialBackoff(base_delay_seconds=900, max_retries=5)

    async def execute(self) -> None:
        raise TimeoutError("no response from srm://tape.example.org:8443 within 30 s")


class Summarise(PeriodicVoAwareBaseTask):
    """For each VO."""

    default_schedule = IntervalSeconds(600)

    async def execute(self) -> None: ...


class RemoveSandboxes(PeriodicBaseTask):
    """At night."""

    default_schedule = CronSchedule("0 4 * * *")

    async def execute(self) -> None: ...


class CheckReplicas(PeriodicBaseTask):
    """Fails at times."""

    default_schedule = IntervalSeconds(900)
    retry_policy = NoRetry()

    async def execute(self) -> None:
        raise ConnectionError("cannot reach catalogue.example.org:9197")


TASKS: dict[str, type[BaseTask]] = {
    "transfers:CopyFile": CopyFile,
    "transfers:ReplicateDataset": ReplicateDataset,
    "transfers:CheckFile": CheckFile,
    "transfers:Announce": Announce,
    "transfers:Stage": Stage,
    "catalogue:Register": Register,
    "catalogue:CheckReplicas": CheckReplicas,
    "cleaning:CleanSandbox": CleanSandbox,
    "cleaning:RemoveSandboxes": RemoveSandboxes,
    "accounting:Summarise": Summarise,
}


async def an_hour(redis: Redis) -> None:
    """Counters of the past hour, as workers would have left them."""
    chance = random.Random(7)
    now = int(time.time()) // 60
    rates = {
        "transfers:CopyFile": (40, 21.0),
        "transfers:CheckFile": (160, 0.08),
        "accounting:Summarise": (1, 2.4),
    }
    still_to_come = 0
    for minute in range(now - 1, now - 62, -1):
        swing = 1 + 0.5 * ((minute // 9) % 3) + chance.uniform(-0.15, 0.15)
        packed, done_all = {}, 0
        for name, (rate, seconds) in rates.items():
            done = int(rate * swing)
            failed = int(done * 0.04 * chance.random()) if name == "transfers:CopyFile" else 0
            times = {f"r{bucket_of(seconds * share)}": count for share, count in ((0.5, done // 2), (1.0, done))}
            waits = {f"q{bucket_of(0.3 * share)}": count for share, count in ((0.5, done), (4.0, done // 9))}
            packed[name] = {"done": done, "failed": failed, "retried": failed, **times, **waits}
            packed[name] |= {"run": seconds * done, "queue": 0.3 * done}
            done_all += done
        still_to_come += int(done_all * chance.uniform(0.95, 1.06))
        for prefix, bucket in ((keys.MINUTE_PREFIX, minute), (keys.HOUR_PREFIX, minute // 60)):
            await redis.hset(
                f"{prefix}{bucket}", mapping={name: msgpack.packb(each) for name, each in packed.items()}
            )
        stream = "diracx:tasks:normal:medium"
        ended_late = int(done_all * chance.uniform(0.94, 1.0))
        flow = {
            "at": minute * 60_000 + 900,
            f"{stream} added": -still_to_come,
            f"{stream} length": int(44 + 6 * swing + chance.uniform(-4, 4)),
            f"{stream} ended": ended_late,
        }
        await redis.hset(f"{keys.THROUGHPUT_PREFIX}{minute}", mapping=flow)


async def a_day(db: MyPilotDB) -> int:
    """Make compute elements with pilots; return one pilot."""
    chance = random.Random(3)
    for name, capacity, backend in (
        ("arc01.tier1.example.org", 60, "arc"),
        ("arc02.tier1.example.org", 60, "arc"),
        ("slurm.hpc.example.org", 40, "slurm"),
        ("login.university.example.org", 12, "ssh"),
        ("ce.flaky.example.org", 30, "arc"),
        ("old.example.org", 20, "arc"),
        ("upgrade.example.org", 25, "slurm"),
    ):
        await db.add_ce(name, capacity, 1.0, backend=backend, vos=["lhcb"] if "hpc" in name else None)
    now = datetime.now(UTC)
    events: list[tuple[datetime, str, str]] = []
    for _ in range(420):
        ce = chance.choice(
            ["arc01.tier1.example.org", "arc02.tier1.example.org", "slurm.hpc.example.org"] * 3
            + ["login.university.example.org", "ce.flaky.example.org", "upgrade.example.org"]
        )
        vo = "lhcb" if "hpc" in ce else chance.choice([*VOS, "lhcb"])
        events.append((now - timedelta(minutes=chance.uniform(1, 1430)), ce, vo))
    followed = 0
    for at, ce, vo in sorted(events):
        with clock.simulated(lambda at=at: at):
            try:
                pilot = await db.submit_pilot(ce, vo)
            except NoRoomError:
                continue
            await db.confirm_pilots([(pilot, f"job-{7000 + pilot}")])
        started = at + timedelta(minutes=chance.uniform(2, 25))
        ended = started + timedelta(minutes=chance.uniform(60, 400))
        if started < now:
            with clock.simulated(lambda started=started: started):
                await db.update_pilot_status(pilot, MyPilotStatus.RUNNING)
        if ended < now and started < now:
            failed = chance.random() < (0.6 if "flaky" in ce else 0.03)
            with clock.simulated(lambda ended=ended: ended):
                await db.update_pilot_status(
                    pilot,
                    MyPilotStatus.FAILED if failed else MyPilotStatus.DONE,
                    reason="exit code 137: out of memory" if failed else None,
                )
            followed = pilot if failed else followed
    for _ in range(2):
        await db.record_failure(
            "ce.flaky.example.org",
            CECall.SUBMIT,
            "submission refused: 503 Service Unavailable",
            failures=1,
            pause_seconds=240,
            max_pause_seconds=900,
        )
    await db.set_ce_enabled("upgrade.example.org", False)
    await db.ban_ce("old.example.org", reason="file system check until Thursday")
    await db.queue_outputs([followed])
    await db.store_outputs([Output(followed, now + timedelta(days=7), _STDOUT, "Killed\n")])
    return followed


_STDOUT = """\
2026-01-01 03:12:07 pilot starts on wn117.example.org, 8 cores, 16 GB
2026-01-01 03:12:09 CernVM-FS is mounted; environment is ready
2026-01-01 03:12:11 matched job 1048817 of user j.doe
2026-01-01 05:40:52 job 1048817 uses 15.8 GB of 16 GB
"""


@asynccontextmanager
async def system_of(redis_url: str) -> AsyncIterator[TaskSystem]:
    """It, running."""
    settings = {"grace_seconds": 0.0}
    with (
        patch.object(reporter, "REPORT_SECONDS", 0.3),
        patch.object(socket, "gethostname", lambda: next(HOSTS)),
    ):
        async with TaskSystem(
            TASKS,
            redis_url=redis_url,
            workers=2,
            concurrency=12,
            vos=VOS,
            config=yaml.safe_load(CONFIG),
            settings=settings,
        ) as system:
            yield system


async def a_night(system: TaskSystem) -> None:
    """Make the state of a system at 3 a.m."""
    for number in range(5):
        await CopyFile(f"/lhcb/MC/2026/{number:08}.dst", "CERN-EOS").schedule()
    for owner in ("j.doe", "j.doe", "a.smith"):
        await CleanSandbox(owner).schedule()
    await ReplicateDataset("MC/2026/SIM", "RAL-ECHO").schedule()
    for number in range(3):
        await Register(f"/lhcb/data/2026/RAW/{number:06}.raw", "secret").schedule()
    await Stage("/lhcb/data/2026/RAW/000042.raw").schedule()
    await system.broker.submit(
        [
            Submission(
                TaskMessage(task_id=f"{number:032x}", task_name="production:Merge", task_args=[7000 + number]),
                "diracx:tasks:background:large",
            )
            for number in range(37)
        ]
    )


async def steered(context: AppContext) -> None:
    """Write the start records of the processes, and the actions of operators tonight."""
    config = (await context.settings()).tasks
    for process, role in (("wn042", "worker medium"), ("wn043", "worker medium"), ("wn043", "scheduler")):
        publisher = ActiveConfigPublisher(context.redis, f"{process}.example.org:21{len(role)}:5e1f00d5")
        await publisher.publish(ActiveConfig(role, "tasks.yaml", digest(config), time.time() - 40_000, tuple(VOS)))
    operator = Operator(context, "wilma", "dashboard")
    await operator.pause(["cleaning:RemoveSandboxes"])
    ran = ["accounting:Summarise/lhcb", "accounting:Summarise/cta", "catalogue:CheckReplicas"]
    for schedule in ran:
        await operator.run_schedule(schedule)

    async def over() -> bool:
        return await context.redis.hlen(keys.OUTCOMES) == len(ran)

    await until(over)


def loads(now: float) -> list[Load]:
    """Report the last ten minutes, as while a user watches."""
    chance = random.Random(5)
    found, waiting = [Load(now, 37, 13)], 37.0
    for second in range(2, 600, 2):
        waiting += 0.1 * (37 - waiting) + chance.uniform(-2, 2)
        found.append(Load(now - second, int(waiting), 13 + chance.randint(-1, 1)))
    return found[::-1]
