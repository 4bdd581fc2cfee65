"""The run: start everything, submit, disturb, wait until all is quiet again, stop."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from diracx.tasks.plumbing import PeriodicBaseTask, PeriodicVoAwareBaseTask
from diracx.tasks.plumbing.binding import Binding, bound_to
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.models import TaskMessage
from diracx.tasks.plumbing.callbacks import spawn_with_callback
from diracx.tasks.plumbing.config import CONFIG_PATH_VARIABLE, TasksConfig
from diracx.tasks.plumbing.factory import load_task_registry, tasks_of_module
from diracx.tasks.plumbing.persistence import TaskDB
from diracx.tasks.testing.server import ValkeyProcess

from . import tasks, witness
from .plan import Disturbance, Plan, Planned
from .processes import History, Supervised
from .remains import everything, leftovers

#: Name of our own connections, which are left alone: a submission without an answer may have arrived or not.
_OURS = "chaos-driver"
_TICK_SECONDS = 0.05
#: More than the default of 3: here workers die every few seconds, and innocent tasks with them.
MAX_DELIVERIES = 5
#: Younger connections are left alone: a process that starts may give up at once, by promise.
_GROWN_UP_SECONDS = 5


@dataclass
class Observed:
    """What the verdict is made of, beside the testimony of the tasks."""

    history: History
    started: float
    """When the submissions began (monotonic)."""
    rested: float | None = None
    """When everything had come to rest; None: it never did."""
    left: dict[str, int] = field(default_factory=dict)
    """What was still there when the patience ended."""
    remains: dict[str, Any] = field(default_factory=dict)
    """Every key of the server with what was in it then."""
    due: dict[int, float] = field(default_factory=dict)
    """Delayed task -> not before (monotonic)."""
    submitted: dict[int, str] = field(default_factory=dict)
    """Number -> kind."""
    groups: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Callback -> its children."""
    letters: list[dict[str, Any]] = field(default_factory=list)
    """Dead letters: n, kind, reason."""
    leftover_keys: list[str] = field(default_factory=list)
    exit_codes: dict[str, int] = field(default_factory=dict)
    """Of the processes that were stopped at the end."""
    cut_connections: int = 0
    done: dict[str, int] = field(default_factory=dict)
    """Disturbance -> how often."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Driver:
    def __init__(
        self,
        plan: Plan,
        *,
        workers: int,
        schedulers: int,
        lease: float,
        slots: int,
        directory: Path,
        patience: float,
    ) -> None:
        self._plan = plan
        self._directory = directory
        self._patience = patience
        self._server = ValkeyProcess(directory)
        self._history = History()
        self._numbers = (workers, schedulers, lease, slots)
        self._workers: list[Supervised] = []
        self._schedulers: list[Supervised] = []
        self._stopping = False

    async def run(self) -> Observed:
        self._server.start()
        broker = RedisStreamBroker(self._server.url, client_name=_OURS)
        database_url = f"sqlite+aiosqlite:///{self._directory}/taskdb.sqlite"
        database = TaskDB(database_url)
        try:
            async with database.engine_context():
                async with database.engine.begin() as connection:
                    await connection.run_sync(database.metadata.create_all)
                self._prepare(database_url)
                supervising = asyncio.create_task(self._supervise())
                with bound_to(broker, tasks_of_module(tasks), TasksConfig()):
                    observed = await self._disturbed(broker)
                self._stopping = True
                await supervising
                await asyncio.to_thread(self._stop, observed)
                observed.letters = await self._letters(database)
                observed.leftover_keys = await leftovers(broker.redis)
            return observed
        finally:
            for process in [*self._workers, *self._schedulers]:
                process.kill()
                process.wait_end(5)
            await broker.shutdown()
            self._server.stop()

    # --- processes ------------------------------------------------------------------------------------------

    def _prepare(self, database_url: str) -> None:
        workers, schedulers, lease, slots = self._numbers
        testimony = self._directory / "witness"
        testimony.mkdir()
        configuration = self._directory / "tasks.yaml"
        configuration.write_text(json.dumps({"common": _not_ours()}))
        environment = {
            CONFIG_PATH_VARIABLE: str(configuration),
            "DIRACX_TASKS_REDIS_URL": self._server.url,
            "DIRACX_DB_URL_TASKDB": database_url,
            witness.VARIABLE: str(testimony),
        }
        common = ["--module", tasks.__name__, "--log-level", "warning"]

        def place(name: str, arguments: list[str]) -> Supervised:
            return Supervised(name, [*arguments, *common], environment, self._directory, self._history)

        for number in range(workers):
            options = ["--lease-seconds", str(lease), "--max-concurrent-tasks", str(slots), "--grace", "5"]
            options += ["--max-deliveries", str(MAX_DELIVERIES)]
            size = ("medium", "small")[number % 2]
            self._workers.append(place(f"worker-{number}", ["worker", "--worker-size", size, *options]))
        for number in range(schedulers):
            self._schedulers.append(place(f"scheduler-{number}", ["scheduler"]))

    async def _supervise(self) -> None:
        while not self._stopping:
            for process in [*self._workers, *self._schedulers]:
                process.look()
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

    # --- the storm ------------------------------------------------------------------------------------------

    async def _disturbed(self, broker: RedisStreamBroker) -> Observed:
        workers = len(self._workers)
        deadline = time.monotonic() + 60
        while await broker.redis.zcard(keys.ALIVE) < workers:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the workers do not start; see {self._directory}/worker-*.log")
            await asyncio.sleep(_TICK_SECONDS)
        observed = Observed(self._history, time.monotonic())
        say(
            f"{self._plan.tasks} tasks and {len(self._plan.disturbances)} disturbances in {self._plan.seconds:g} s"
        )
        async with asyncio.TaskGroup() as together:
            together.create_task(self._submit(observed, broker))
            together.create_task(self._disturb(observed, broker))
            progress = together.create_task(self._report(observed, broker))
            together.create_task(self._rest(observed, broker, progress))
        return observed

    async def _submit(self, observed: Observed, broker: RedisStreamBroker) -> None:
        binding = Binding(broker, tasks_of_module(tasks), TasksConfig())
        waiting = list(reversed(self._plan.submissions))
        while waiting:
            now = time.monotonic() - observed.started
            batch = []
            while waiting and waiting[-1].at <= now:
                batch.append(waiting.pop())
            submissions = []
            for planned in batch:
                if planned.children:
                    await self._submit_group(observed, planned)
                    continue
                task = getattr(tasks, planned.kind)(*planned.arguments)
                at_time = None
                if planned.delay:
                    at_time = datetime.now(UTC) + timedelta(seconds=planned.delay)
                    observed.due[planned.arguments[0]] = time.monotonic() + planned.delay
                submissions.append(binding.submission(task, at_time=at_time))
                observed.submitted[planned.arguments[0]] = planned.kind
            if submissions:
                await broker.submit(submissions)
            await asyncio.sleep(_TICK_SECONDS)

    async def _submit_group(self, observed: Observed, planned: Planned) -> None:
        [callback] = planned.arguments
        children = [tasks.Child(n) for n in planned.children]
        await spawn_with_callback(
            children, tasks.GroupDone(callback), on_failure=tasks.GroupFailed(callback), ttl_seconds=3600
        )
        observed.groups[callback] = planned.children
        observed.submitted |= dict.fromkeys(planned.children, "Child") | {callback: "GroupDone"}

    async def _disturb(self, observed: Observed, broker: RedisStreamBroker) -> None:
        rng = random.Random(len(self._plan.disturbances))
        for disturbance in self._plan.disturbances:
            await asyncio.sleep(max(0.0, observed.started + disturbance.at - time.monotonic()))
            what = disturbance.what
            if what.startswith("cut"):
                how_many = disturbance.which if "some" in what else None
                observed.cut_connections += await self._cut(broker, rng, how_many)
            else:
                places = self._schedulers if "scheduler" in what else self._workers
                if not self._strike(disturbance, places):
                    continue
            observed.done[what] = observed.done.get(what, 0) + 1
        for process in [*self._workers, *self._schedulers]:
            process.resume()

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
        clients = [
            client["id"]
            for client in await broker.redis.client_list()
            if client["name"] != _OURS and int(client["age"]) >= _GROWN_UP_SECONDS
        ]
        victims = clients if how_many is None else rng.sample(clients, min(how_many, len(clients)))
        for victim in victims:
            await broker.redis.execute_command("CLIENT", "KILL", "ID", victim)
        return len(victims)

    # --- the end --------------------------------------------------------------------------------------------

    async def _left(self, broker: RedisStreamBroker) -> dict[str, int]:
        """What keeps the system from being at rest."""
        async with broker.redis.pipeline(transaction=True) as pipe:
            for stream in keys.EVERY_STREAM:
                pipe.xlen(stream)
            pipe.zcard(keys.DELAYED)
            pipe.zcard(keys.ALIVE)
            *lengths, delayed, alive = await pipe.execute()
        left = {stream: length for stream, length in zip(keys.EVERY_STREAM, lengths, strict=True) if length}
        if delayed:
            left[keys.DELAYED] = delayed
        if alive != len(self._workers):
            left[keys.ALIVE] = alive
        return left

    async def _rest(self, observed: Observed, broker: RedisStreamBroker, progress: asyncio.Task[None]) -> None:
        end = observed.started + self._plan.seconds
        await asyncio.sleep(max(0.0, end - time.monotonic()))
        quiet_since: float | None = None
        while time.monotonic() < end + self._patience:
            left = await self._left(broker)
            # An occurrence of the schedule may just pass through.
            if len(observed.submitted) == self._plan.tasks and not left:
                quiet_since = quiet_since or time.monotonic()
                if time.monotonic() - quiet_since > 0.2:
                    observed.rested = quiet_since
                    break
            else:
                quiet_since = None
                observed.left = left
            await asyncio.sleep(_TICK_SECONDS)
        else:
            observed.remains = await everything(broker.redis)
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
    async def _letters(database: TaskDB) -> list[dict[str, Any]]:
        letters: list[dict[str, Any]] = []
        last = 0
        while True:
            async with database as db:
                rows = await db.search(limit=500, after_id=last)
            if not rows:
                return letters
            for row in rows:
                last = row["id"]
                n, kind = None, row["task_name"].rpartition(":")[2]
                if row["task_name"]:
                    n = (TaskMessage.loadb(row["message"]).task_args or [None])[0]
                letters.append({"n": n, "kind": kind, "reason": row["reason"], "detail": row["detail"]})


def _not_ours() -> dict[str, Any]:
    """Switches off what is installed and runs by the clock: what fails here is put aside, and there is no rest."""
    by_the_clock = PeriodicBaseTask | PeriodicVoAwareBaseTask
    installed = load_task_registry()
    return {name: {"enabled": False} for name, cls in installed.items() if issubclass(cls, by_the_clock)}


def keep(observed: Observed, path: Path) -> None:
    """Write down what the verdict was made of, for whoever looks into a broken promise."""
    path.write_text(
        json.dumps(
            {
                "started": observed.started,
                "killed": observed.history.killed,
                "pauses": observed.history.pauses,
                "ended": observed.history.ended,
                "letters": observed.letters,
                "left": observed.left,
                "leftover keys": observed.leftover_keys,
                "remains": observed.remains,
            },
            indent=1,
        )
    )
