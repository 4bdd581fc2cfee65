"""A run: start, submit, inject failures, wait for the end, stop."""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from diracx.tasks.plumbing import PeriodicBaseTask, PeriodicVoAwareBaseTask
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.models import Submission, TaskMessage
from diracx.tasks.plumbing.callbacks import spawn_with_callback
from diracx.tasks.plumbing.config import CONFIG_PATH_VARIABLE, TasksConfig
from diracx.tasks.plumbing.exceptions import SendTaskError
from diracx.tasks.plumbing.persistence import TaskDB
from diracx.tasks.plumbing.registry import load_task_registry, tasks_of_module
from diracx.tasks.plumbing.submission.client import Binding, bound_to
from redis.exceptions import RedisError

from . import records, redis_servers, tasks
from .databases import Database
from .leftover_keys import everything, leftovers
from .links import Link
from .plan import PROFILES, Disturbance, Plan, Planned
from .processes import History, Supervised
from .redis_servers import Outage

#: Name of the connection that watches; no disturbance meets it but those of the server itself.
_OURS = "chaos-driver"
#: Name of the place that submits.
SUBMITTER = "submitter"
#: A client that does not wait for long, so that there are submissions without a reply.
_SUBMITTER_OPTIONS = "socket_timeout=2"
_TICK_SECONDS = 0.05
#: More than the default of 3: here workers die every few seconds, and innocent tasks with them.
MAX_DELIVERIES = 4
#: Younger connections are left alone: a process that starts may give up at once, by promise.
_GROWN_UP_SECONDS = 5


@dataclass(frozen=True)
class Settings:
    """Settings of a run."""

    profile: str
    redis: str
    database: str
    workers: int
    schedulers: int
    lease: float
    slots: int
    rest_seconds: float


@dataclass
class Observed:
    """Observations from outside, beside the records of the tasks."""

    history: History
    started: float
    """Time when the submissions began (monotonic)."""
    outages: list[Outage] = field(default_factory=list)
    settled: float = 0.0
    """Time when the last disturbance was over (monotonic)."""
    rested: float | None = None
    """Time when everything had come to rest; None: it never did."""
    left: dict[str, int] = field(default_factory=dict)
    """Remaining work when the wait ended."""
    remains: dict[str, Any] = field(default_factory=dict)
    """All keys of the server with their content."""
    due: dict[int, float] = field(default_factory=dict)
    """Delayed task -> not before (monotonic)."""
    submitted: dict[int, str] = field(default_factory=dict)
    """Number -> kind."""
    acknowledged: dict[int, float] = field(default_factory=dict)
    """Number -> when its submission was confirmed (monotonic). One that was not may have arrived or not."""
    groups: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Callback -> its children."""
    dead_letters: list[dict[str, Any]] = field(default_factory=list)
    """Dead letters: n, kind, reason."""
    leftover_keys: list[str] = field(default_factory=list)
    exit_codes: dict[str, int] = field(default_factory=dict)
    """Exit codes of the processes that were stopped at the end."""
    cut_connections: int = 0
    done: Counter[str] = field(default_factory=Counter)
    """Disturbance -> how often."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Driver:
    def __init__(self, plan: Plan, settings: Settings, directory: Path) -> None:
        self._plan, self._settings, self._directory = plan, settings, directory
        self._history = History()
        self._redis = redis_servers.make(settings.redis, directory)
        self._database = Database(settings.database, directory, self._history)
        self._workers: list[Supervised] = []
        self._schedulers: list[Supervised] = []
        self._links: dict[str, Link] = {}
        self._led_to = ""
        self._stopping = False

    async def run(self) -> Observed:
        watching: RedisStreamBroker | None = None
        try:
            await self._redis.start()
            await self._database.start()
            watching = RedisStreamBroker(self._redis.url, client_name=_OURS)
            async with self._task_db() as database, database.engine.begin() as connection:
                await connection.run_sync(database.metadata.create_all)
            self._prepare()
            supervising = asyncio.create_task(self._supervise())
            observed = await self._disturbed(watching)
            self._stopping = True
            await supervising
            await asyncio.to_thread(self._stop, observed)
            async with self._task_db() as database:
                observed.dead_letters = await self._dead_letters(database)
            observed.leftover_keys = await leftovers(watching.redis)
            return observed
        finally:
            for process in [*self._workers, *self._schedulers]:
                process.kill()
                process.wait_end(5)
            if watching is not None:
                await watching.shutdown()
            for link in self._links.values():
                link.stop()
            self._redis.stop()
            await asyncio.to_thread(self._database.stop)

    @asynccontextmanager
    async def _task_db(self) -> AsyncIterator[TaskDB]:
        database = TaskDB(self._database.own_url)
        async with database.engine_context():
            yield database

    # --- processes ------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        settings = self._settings
        records_directory = self._directory / "records"
        records_directory.mkdir()
        configuration = self._directory / "tasks.yaml"
        configuration.write_text(json.dumps({"common": _without_installed_schedules()}))
        environment = {
            CONFIG_PATH_VARIABLE: str(configuration),
            "DIRACX_DB_URL_TASKDB": self._database.url,
            records.VARIABLE: str(records_directory),
        }
        common = ["--module", tasks.__name__, "--log-level", "warning"]

        def place(name: str, arguments: list[str], **more: str) -> Supervised:
            own = environment | {"DIRACX_TASKS_REDIS_URL": self._url_for(name)} | more
            return Supervised(name, [*arguments, *common], own, self._directory, self._history)

        options = ["--lease-seconds", str(settings.lease), "--max-concurrent-tasks", str(settings.slots)]
        options += ["--grace", "5", "--max-deliveries", str(MAX_DELIVERIES)]
        for number in range(settings.workers):
            size = ("medium", "small")[number % 2]
            # Two versions at once: of four workers the last two know messages that the others leave to them.
            newer = {tasks.NEWER_VARIABLE: "1"} if number in (2, 3) and settings.workers >= 4 else {}
            arguments = ["worker", "--worker-size", size, *options]
            self._workers.append(place(f"worker-{number}", arguments, **newer))
        for number in range(settings.schedulers):
            self._schedulers.append(place(f"scheduler-{number}", ["scheduler"]))

    def _url_for(self, name: str) -> str:
        """Through a link of its own, if links are disturbed."""
        if "net" not in PROFILES[self._settings.profile][0]:
            return self._redis.url
        self._led_to = self._redis.primary_url
        self._links[name] = Link(name, self._led_to, self._history)
        return self._links[name].url

    async def _supervise(self) -> None:
        while not self._stopping:
            for process in [*self._workers, *self._schedulers]:
                process.look()
            for link in self._links.values():
                link.look()
            if self._links and self._led_to != self._redis.primary_url:  # after a failover
                self._led_to = self._redis.primary_url
                for link in self._links.values():
                    link.lead_to(self._led_to)
            self._database.look()
            self._redis.look()
            await asyncio.sleep(_TICK_SECONDS)

    def _stop(self, observed: Observed) -> None:
        everybody = [*self._workers, *self._schedulers]
        for process in everybody:
            process.resume()
            process.look(restart=False)
            process.terminate()
        for process in everybody:
            if (pid := process.pid) is not None:
                process.wait_end(15)
                observed.exit_codes[process.name] = self._history.ended[pid][1]

    # --- disturbances ------------------------------------------------------------------------------------------

    async def _disturbed(self, watching: RedisStreamBroker) -> Observed:
        workers = len(self._workers)
        deadline = time.monotonic() + 60
        while await watching.redis.zcard(keys.ALIVE) < workers:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the workers do not start; see {self._directory}/worker-*.log")
            await asyncio.sleep(_TICK_SECONDS)
        observed = Observed(self._history, time.monotonic(), self._redis.outages)
        disturbances = len(self._plan.disturbances)
        say(f"{self._plan.tasks} tasks and {disturbances} disturbances in {self._plan.seconds:g} s")
        submitting = RedisStreamBroker(f"{self._url_for(SUBMITTER)}?{_SUBMITTER_OPTIONS}", client_name=_OURS)
        try:
            async with asyncio.TaskGroup() as together:
                active = [
                    together.create_task(self._submit(observed, submitting)),
                    together.create_task(self._disturb(observed, watching)),
                ]
                progress = together.create_task(self._report(observed, watching))
                together.create_task(self._rest(observed, watching, active, progress))
        finally:
            await submitting.shutdown()
        return observed

    async def _submit(self, observed: Observed, broker: RedisStreamBroker) -> None:
        binding = Binding(broker, tasks_of_module(tasks), TasksConfig())
        waiting = list(reversed(self._plan.submissions))
        while waiting:
            now = time.monotonic() - observed.started
            submissions: list[Submission] = []
            numbers: list[int] = []
            while waiting and waiting[-1].at <= now:
                planned = waiting.pop()
                if planned.children:
                    await self._submit_group(observed, binding, planned)
                    continue
                submissions.append(self._submission(observed, binding, planned))
                numbers.append(planned.arguments[0])
            if submissions:
                await self._send(observed, broker, numbers, partial(broker.submit, submissions))
            await asyncio.sleep(_TICK_SECONDS)

    @staticmethod
    def _submission(observed: Observed, binding: Binding, planned: Planned) -> Submission:
        n = planned.arguments[0]
        at_time = None
        if planned.delay:
            at_time = datetime.now(UTC) + timedelta(seconds=planned.delay)
            observed.due[n] = time.monotonic() + planned.delay
        observed.submitted[n] = planned.kind
        submission = binding.submission(getattr(tasks, planned.kind)(*planned.arguments), at_time=at_time)
        if planned.kind == "Newer":
            submission.message.later_fields = {"format": tasks.NEWER_FORMAT}
        return submission

    async def _submit_group(self, observed: Observed, binding: Binding, planned: Planned) -> None:
        [callback] = planned.arguments
        observed.groups[callback] = planned.children
        observed.submitted |= dict.fromkeys(planned.children, "Child") | {callback: "GroupDone"}

        async def spawn() -> None:
            with bound_to(binding.broker, binding.registry, binding.config):
                await spawn_with_callback(
                    [tasks.Child(n) for n in planned.children],
                    tasks.GroupDone(callback),
                    on_failure=tasks.GroupFailed(callback),
                    ttl_seconds=3600,
                )

        await self._send(observed, binding.broker, [*planned.children, callback], spawn)

    @staticmethod
    async def _send(
        observed: Observed,
        broker: RedisStreamBroker,
        numbers: Sequence[int],
        call: Callable[[], Awaitable[None]],
    ) -> None:
        """Submit once. What has no reply is not repeated; then wait until the server accepts writes again."""
        try:
            await call()
        except SendTaskError:
            while True:
                try:
                    await broker.redis.set("chaos:probe", 1, px=1)
                    return
                except (RedisError, OSError):
                    await asyncio.sleep(_TICK_SECONDS)
        observed.acknowledged |= dict.fromkeys(numbers, time.monotonic())

    async def _disturb(self, observed: Observed, watching: RedisStreamBroker) -> None:
        rng = random.Random(len(self._plan.disturbances))
        for disturbance in self._plan.disturbances:
            await asyncio.sleep(max(0.0, observed.started + disturbance.at - time.monotonic()))
            what = disturbance.what
            if what.endswith("connections"):
                how_many = disturbance.which if "some" in what else None
                cut = await self._cut(watching, rng, how_many)
                observed.cut_connections += cut
                struck = cut > 0
            elif "database" in what:
                struck = self._database.strike(disturbance)
            elif " link" in what:
                struck = self._strike_link(disturbance)
            elif what.startswith("power cut") or "server" in what:
                struck = self._redis.strike(disturbance)
            else:
                struck = self._strike(disturbance, self._schedulers if "scheduler" in what else self._workers)
            observed.done[what] += struck
        for process in [*self._workers, *self._schedulers]:
            process.resume()
        for link in self._links.values():
            link.look(end=True)
        await self._database.settle()
        await self._redis.settle()

    def _strike_link(self, disturbance: Disturbance) -> bool:
        """At the planned victim, or at the next one that is not disturbed already."""
        links = list(self._links.values())
        for offset in range(len(links)):
            link = links[(disturbance.which + offset) % len(links)]
            if not link.disturbed:
                link.strike(disturbance)
                return True
        return False

    @staticmethod
    def _strike(disturbance: Disturbance, places: Sequence[Supervised]) -> bool:
        """At the planned victim, or at the next one that runs."""
        for offset in range(len(places)):
            victim = places[(disturbance.which + offset) % len(places)]
            if victim.pid is None or victim.paused:
                continue
            if disturbance.what.startswith("kill"):
                victim.kill()
            elif disturbance.what.startswith("pause"):
                victim.pause(disturbance.seconds)
            else:
                victim.terminate()
            return True
        return False

    @staticmethod
    async def _cut(broker: RedisStreamBroker, rng: random.Random, how_many: int | None) -> int:
        try:
            listed = await broker.redis.client_list()
        except RedisError:  # the server is unavailable, and so are its connections
            return 0
        clients = [
            client["id"]
            for client in listed
            if client["name"] != _OURS
            and int(client["age"]) >= _GROWN_UP_SECONDS
            and not {"S", "M"} & set(client["flags"])  # replication
        ]
        victims = clients if how_many is None else rng.sample(clients, min(how_many, len(clients)))
        killed = 0
        for victim in victims:
            with suppress(RedisError):  # it is gone already
                await broker.redis.execute_command("CLIENT", "KILL", "ID", victim)
                killed += 1
        return killed

    # --- the end --------------------------------------------------------------------------------------------

    async def _left(self, broker: RedisStreamBroker) -> dict[str, int]:
        """Count objects that prevent the end of the run."""
        try:
            async with broker.redis.pipeline(transaction=True) as pipe:
                for stream in keys.EVERY_STREAM:
                    pipe.xlen(stream)
                pipe.zcard(keys.DELAYED)
                pipe.zcard(keys.ALIVE)
                *lengths, delayed, alive = await pipe.execute()
        except (RedisError, OSError):
            return {"server unavailable": 1}
        left = {stream: length for stream, length in zip(keys.EVERY_STREAM, lengths, strict=True) if length}
        if delayed:
            left[keys.DELAYED] = delayed
        if alive != len(self._workers):
            left[keys.ALIVE] = alive
        return left

    async def _rest(
        self,
        observed: Observed,
        watching: RedisStreamBroker,
        active: Sequence[asyncio.Task[None]],
        progress: asyncio.Task[None],
    ) -> None:
        await asyncio.wait(active)
        observed.settled = end = time.monotonic()
        quiet_since: float | None = None
        fewest, fewer_at = math.inf, end
        while time.monotonic() < fewer_at + self._settings.rest_seconds:
            left = await self._left(watching)
            if sum(left.values()) < fewest:  # a slow machine may have much to do; nothing may stand still
                fewest, fewer_at = sum(left.values()), time.monotonic()
            # An occurrence of the schedule may just pass through.
            if not left:
                quiet_since = quiet_since or time.monotonic()
                if time.monotonic() - quiet_since > 0.2:
                    observed.rested = quiet_since
                    break
            else:
                quiet_since = None
                observed.left = left
            await asyncio.sleep(_TICK_SECONDS)
        else:
            with suppress(RedisError, OSError):  # the server may be the reason why not all tasks ended
                observed.remains = await everything(watching.redis)
        progress.cancel()

    async def _report(self, observed: Observed, broker: RedisStreamBroker) -> None:
        while True:
            await asyncio.sleep(5)
            left = await self._left(broker)
            done = ", ".join(f"{what} {times}" for what, times in sorted(observed.done.items()))
            waiting = sum(number for name, number in left.items() if name != keys.ALIVE)
            alive = sum(process.pid is not None and not process.paused for process in self._workers)
            say(
                f"{time.monotonic() - observed.started:5.0f} s: {len(observed.submitted)} submitted, {waiting} "
                f"in the system, {alive} workers up; {done}"
            )

    @staticmethod
    async def _dead_letters(database: TaskDB) -> list[dict[str, Any]]:
        dead_letters: list[dict[str, Any]] = []
        last = 0
        while True:
            async with database as db:
                rows = await db.search(limit=500, after_id=last)
            if not rows:
                return dead_letters
            for row in rows:
                last = row["id"]
                n, kind = None, row["task_name"].rpartition(":")[2]
                if row["task_name"]:
                    n = (TaskMessage.loadb(row["message"]).task_args or [None])[0]
                dead_letters.append({"n": n, "kind": kind, "reason": row["reason"], "detail": row["detail"]})


def _without_installed_schedules() -> dict[str, Any]:
    """Switches off failures by time, so that a run fails if the system does not come to rest."""
    by_the_clock = PeriodicBaseTask | PeriodicVoAwareBaseTask
    installed = load_task_registry()
    return {name: {"enabled": False} for name, cls in installed.items() if issubclass(cls, by_the_clock)}


def keep(observed: Observed, path: Path) -> None:
    """Write the observations behind the result, to investigate a broken promise."""
    path.write_text(
        json.dumps(
            {
                "started": observed.started,
                "killed": observed.history.killed,
                "pauses": observed.history.pauses,
                "ended": observed.history.ended,
                "processes started": observed.history.started,
                "stopped": observed.history.stopped,
                "places": observed.history.names,
                "disconnected": observed.history.disconnected,
                "outages": [vars(outage) for outage in observed.outages],
                "acknowledged": observed.acknowledged,
                "dead_letters": observed.dead_letters,
                "left": observed.left,
                "leftover keys": observed.leftover_keys,
                "remains": observed.remains,
            },
            indent=1,
        )
    )
