"""The ACL of each role (deploy/redis/acl) permits its work."""

from __future__ import annotations

import importlib.util
import re
import sys
import threading
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from diracx.tasks import operations as monitor
from diracx.tasks.operations.audit import AuditLog, read_audit
from diracx.tasks.plumbing import BaseTask, schedule_many, spawn_with_callback
from diracx.tasks.plumbing.base_task import use_broker
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.broker.scripts import script
from diracx.tasks.plumbing.config import TasksConfig
from diracx.tasks.plumbing.config.reader import ConfigReader
from diracx.tasks.plumbing.persistence import TaskDB
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.submission.client import Binding
from diracx.tasks.testing.server import free_port
from diracx.tasks.web.auth.backends import Principal, Role, TokenBackend
from diracx.tasks.web.context import AppContext
from diracx.tasks.web.dashboard import DashboardApp
from diracx.tasks.web.dashboard.pages import PAGES
from redis import Redis
from support.command_line import Background, Cli
from support.redis_acl import LUA, ROLES, Server, allowed, commands_in, named, scripts_of
from support.waiting import until

#: What a client sends whatever it is for: to connect, and to run a script.
BASIC = {
    *("auth", "client|setinfo", "client|setname", "discard", "eval", "evalsha", "hello", "ping"),
    *("quit", "select", "unsubscribe", "unwatch"),
}


#: Scripts that take an accident, or a caller outside of tasks and routes; and `lines`: a worker looks at the lines
#: of locks only where one of them is due while no scheduler leads.
RARELY = {
    *("blocked", "extend", "fail_children", "finished", "fire", "lines", "fetch_unacknowledged"),
    *("acquire", "release", "task_ids"),
}


#: What is sent when there are groups after a change of the server, or one of their children cannot be read; and
#: when a reply was lost.
RARELY_SENT = {"hscan", "sscan", "sismember"}


TASKS = """
from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from diracx.tasks.plumbing import (
    BaseTask, CallbackSpawner, ChildResults, ConcurrencyLimiter, ExclusiveRWLock, ExponentialBackoff,
    IntervalSeconds, LockedObjectType, MutexLock, PeriodicBaseTask, RateLimiter, SharedRWLock, schedule_many,
)

TASK = LockedObjectType("task")


@dataclass
class Quick(BaseTask):
    number: int

    async def execute(self):
        return self.number


@dataclass
class Slow(BaseTask):
    async def execute(self):
        await asyncio.sleep(3600)


@dataclass
class Fail(BaseTask):
    dlq_eligible = True

    async def execute(self):
        raise ValueError("no")


@dataclass
class Flaky(BaseTask):
    retry_policy = ExponentialBackoff(base_delay_seconds=0.3, max_retries=1)

    async def execute(self):
        raise ValueError("not yet")


class Slots(ConcurrencyLimiter):
    limit = 1


class Quota(RateLimiter):
    limit = 2
    window_seconds = 1.0


@dataclass
class Locked(BaseTask):
    number: int
    seconds: float = 0.2

    @property
    def execution_locks(self):
        access = SharedRWLock(TASK, "rw") if self.number % 2 else ExclusiveRWLock(TASK, "rw")
        return [MutexLock(TASK, "one"), Slots(TASK, "slots"), Quota(TASK, "quota"), access]

    async def execute(self):
        await asyncio.sleep(self.seconds)
        return self.number


@dataclass
class Spawn(BaseTask):
    async def execute(self, spawn: CallbackSpawner):
        await schedule_many([Quick(number) for number in range(3)])
        await Quick(1).schedule(at_time=datetime.now(UTC) + timedelta(seconds=1))
        return await spawn([Quick(number) for number in range(3)], Quick(99))


@dataclass
class Collect(BaseTask):
    async def execute(self, results: ChildResults):
        return len(results)


@dataclass
class Held(BaseTask):
    @property
    def execution_locks(self):
        return [MutexLock(TASK, "held")]

    async def execute(self):
        await asyncio.sleep(3600)


class Hourly(PeriodicBaseTask):
    default_schedule = IntervalSeconds(3600)

    async def execute(self):
        return None


class Tick(PeriodicBaseTask):
    default_schedule = IntervalSeconds(0.5)

    async def execute(self):
        return None
"""


# --- what each role sends ---------------------------------------------------------------------------------------


class Monitor:
    """Record of the commands of each role, those of scripts included, by the server's MONITOR.

    A connection is known by its name. The commands of a script follow it.
    """

    def __init__(self, client: Redis) -> None:
        self.sent: dict[str, set[str]] = defaultdict(set)
        self.scripts: dict[str, set[str]] = defaultdict(set)
        self._client = client
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._ends = threading.Event()

    def _listen(self) -> None:
        roles: dict[str, str] = {}
        names = {script(file.name[:-4]).sha: file.name[:-4] for file in LUA.iterdir() if file.name[0] != "_"}
        role = ""
        with self._client.monitor() as lines:
            for line in lines.listen():
                words = line["command"].split()
                if words[0].upper() == "ECHO":  # that all has been seen
                    self._ends.set()
                    return
                where = f"{line['client_address']}:{line['client_port']}"
                if words[:2] == ["CLIENT", "SETNAME"]:
                    roles[where] = words[2]
                if line["client_type"] != "lua":
                    role = roles.get(where, "")
                self.sent[role].add(named(words))
                if words[0] == "EVALSHA" and words[1] in names:
                    self.scripts[role].add(names[words[1]])

    def start(self) -> None:
        self._thread.start()

    def end(self, admin: Redis) -> None:
        admin.echo("end")
        assert self._ends.wait(30)


# --- the whole work of all roles --------------------------------------------------------------------------------


def load_tasks(path: Path) -> Any:
    """The module of tasks, as workers load it with `--module`."""
    path.write_text(TASKS)
    spec = importlib.util.spec_from_file_location("acl_tasks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["acl_tasks"] = module
    spec.loader.exec_module(module)
    return module


class Roles:
    """Processes of each role, and their brokers in this process."""

    def __init__(self, acl_server: Server, cli: Cli, db_url: str) -> None:
        self.server = acl_server
        self.cli = cli
        self.db_url = db_url
        self.ports: list[int] = []
        self.tasks = load_tasks(cli.directory / "acl_tasks.py")
        found = [
            each for each in vars(self.tasks).values() if isinstance(each, type) and issubclass(each, BaseTask)
        ]
        own = [each for each in found if each.__module__ == "acl_tasks"]
        self.registry = TaskRegistry.of({f"acl_tasks:{each.__name__}": each for each in own})

    def start(self, role: str, *args: str, **environment: str) -> Background:
        """Start a command as this role."""
        before = self.cli.environment
        self.cli.environment = {**before, "DIRACX_TASKS_REDIS_URL": self.server.url(role), **environment}
        try:
            return self.cli.start(*args, "--module", "acl_tasks.py")
        finally:
            self.cli.environment = before

    def port(self) -> str:
        """A port for metrics, which are all read at the end."""
        self.ports.append(free_port())
        return str(self.ports[-1])

    def worker(self, **environment: str) -> Background:
        options = ("--worker-size", "medium", "--lease-seconds", "2", "--max-concurrent-tasks", "20")
        options += ("--grace", "1")  # some of its tasks would run for an hour
        made = self.start("worker", "worker", *options, "--metrics-port", self.port(), **environment)
        made.until("ready")
        return made

    @asynccontextmanager
    async def broker(self, role: str) -> AsyncIterator[RedisStreamBroker]:
        made = RedisStreamBroker(self.server.url(role))
        await made.startup()
        with use_broker(lambda: Binding(made, self.registry, TasksConfig())):
            yield made
        await made.shutdown()


async def submit(world: Roles, submitter: RedisStreamBroker) -> None:
    """Run all operations of a submitter, with all that workers and the scheduler do about it."""
    tasks, labels = world.tasks, {"result_ttl_seconds": 60}
    soon, late = (datetime.now(UTC) + timedelta(seconds=seconds) for seconds in (1, 3600))
    waited_for = [
        *[await tasks.Locked(number).schedule(labels=labels) for number in range(3)],
        await tasks.Quick(1).schedule(labels=labels),
        await tasks.Quick(2).schedule(labels=labels, at_time=soon),
        await tasks.Fail().schedule(labels=labels),
        await tasks.Fail().schedule(labels=labels),
        await tasks.Flaky().schedule(labels=labels),
        await tasks.Spawn().schedule(labels=labels),
        *await schedule_many([tasks.Quick(number) for number in range(3)], labels=labels),
    ]
    await tasks.Quick(3).schedule(at_time=late)
    await spawn_with_callback([tasks.Quick(number) for number in range(600)], tasks.Collect())
    await spawn_with_callback([tasks.Quick(0), tasks.Fail()], tasks.Collect(), on_failure=tasks.Quick(5))
    await spawn_with_callback([], tasks.Collect())
    for task_id in waited_for:
        await submitter.wait_result(task_id, 30)
        assert await submitter.is_result_ready(task_id)
        await submitter.get_result(task_id)


async def look_and_act(world: Roles, broker: RedisStreamBroker, slow: list[str]) -> None:
    """All pages of the dashboard, and all that can be done there and by HTTP."""
    from diracx.tasks.web.api.audit_logger import API_USER, UserActionRate

    db = TaskDB(world.db_url)

    async def this() -> AppContext:
        return AppContext(broker, world.registry, ConfigReader(), db)

    app = DashboardApp(this, TokenBackend({"token": Principal("wilma", Role.WRITE, None)}, ""), extensions=[])
    transport = httpx.ASGITransport(app)
    async with db.engine_context(), httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        await client.post("/sign-in", data={"credential": "token"})
        queued = await world.tasks.Quick(1).schedule(at_time=datetime.now(UTC) + timedelta(hours=1))
        await schedule_many([world.tasks.Quick(number) for number in range(3)])
        group = await spawn_with_callback([world.tasks.Held()], world.tasks.Collect())
        values = {"queue": "normal:medium", "group": group, "dead_letter": "1"}
        for page in PAGES:
            path = re.sub(r"\{(\w+)\}", lambda found: values[found[1]], page.path)
            response = await client.get(
                path, params={"key": "lock:mutex:task:held"} if path == "/locks/one" else {}
            )
            assert response.status_code == 200, f"{path}: {response.text}"
        assert (await client.get("/readyz")).status_code == 200
        form = re.search(r'name="form_token" value="(\w+)"', (await client.get("/queues")).text)
        assert form
        held = await monitor.lock(broker.redis, "lock:mutex:task:held")
        assert held is not None
        assert held.waiters
        for path, fields in (
            ("/tasks/cancel", {"task": [queued, *slow]}),
            ("/queues/purge", {"queue": "normal:medium"}),
            ("/schedules/pause", {"schedule": "acl_tasks:Tick"}),
            ("/schedules/resume", {"schedule": "acl_tasks:Tick"}),
            ("/schedules/run-now", {"schedule": "acl_tasks:Hourly"}),
            ("/locks/release", {"key": held.key, "owner": held.holders[0].owner}),
            ("/dead-letters/retry", {"dead_letter": ["1"]}),
            ("/dead-letters/discard", {"dead_letter": ["2"]}),
        ):
            data = {**fields, "form_token": form[1], "confirmed": "yes"}
            response = await client.post(path, data=data)
            assert "%22ok%22%3A%20true" in response.headers.get("set-cookie", ""), f"{path}: {response.headers}"
        assert len(await read_audit(broker.redis)) == 8

        async def nothing() -> str:
            return "nothing"

        assert await UserActionRate(API_USER, "lhcb:fred").acquire(broker.redis)
        await AuditLog(broker.redis, "fred", "api", "lhcb").perform("submit pilot", "ce", nothing)
        assert await read_audit(broker.redis, vo="lhcb")
    await app.aclose()


async def test_each_role_can_do_its_work_and_acl_files_allow_no_unused_commands(
    acl_server: Server, cli: Cli, initialised_task_db: str
) -> None:
    world = Roles(acl_server, cli, initialised_task_db)
    seen = Monitor(Redis.from_url(f"redis://test:any@127.0.0.1:{acl_server.process.port}", socket_timeout=None))
    seen.start()
    doomed = world.worker()
    async with world.broker("dashboard") as dashboard, world.broker("submitter") as submitter:
        slow = [await world.tasks.Slow().schedule(), await world.tasks.Held().schedule()]

        async def run(deliveries: int) -> bool:
            running = (await monitor.running(dashboard.redis)).items
            return {task.task_id for task in running if task.deliveries == deliveries} >= set(slow)

        await until(lambda: run(1))
        doomed.process.kill()
        worker, scheduler = world.worker(), world.start("scheduler", "scheduler", "--metrics-port", world.port())
        scheduler.until("leading")
        await submit(world, submitter)
        await until(lambda: run(2))  # taken over from the one that was killed

        async def groups_are_done() -> bool:
            return not await monitor.groups(dashboard.redis)

        await until(groups_are_done)
        await world.tasks.Held().schedule()
        await world.tasks.Held().schedule()
        # One with a database takes what waited for one.
        second = world.worker(DIRACX_DB_URL_TASKDB=initialised_task_db)
        second.until("took")

        async def waits_for_lock() -> bool:
            return bool((await monitor.delayed(dashboard.redis, "lock")).items)

        await until(waits_for_lock)
        async with bound(world, dashboard):
            await look_and_act(world, dashboard, slow[:1])
        another = world.start(
            *("scheduler", "scheduler", "--resubmit-dead-letters"), DIRACX_DB_URL_TASKDB=initialised_task_db
        )
        another.until("submitted again")
    async with httpx.AsyncClient() as client:
        for port in world.ports[1:]:
            for path in ("metrics", "readyz"):
                assert (await client.get(f"http://127.0.0.1:{port}/{path}")).status_code == 200
    for command in (second, worker, scheduler, another):
        command.process.terminate()
        assert command.ends() == 0, command.output
        assert "NOPERM" not in command.output
    seen.end(acl_server.admin)
    denied = [
        f"{entry['username']}: {entry['object']} ({entry['reason']})"
        for entry in acl_server.admin.acl_log()
        if entry["username"] in {f"diracx-{role}" for role in ROLES}
    ]
    assert not denied
    for role in ROLES:
        assert seen.scripts[role] <= scripts_of(role), role
        unseen = scripts_of(role) - seen.scripts[role] - RARELY
        assert not unseen, f"{role} does not run {sorted(unseen)}"
        in_scripts = {command for name in scripts_of(role) for command in commands_in(name)}
        needless = allowed(role) - in_scripts - seen.sent[role] - BASIC - RARELY_SENT
        assert not needless, f"{role}.acl allows what nothing needs: {sorted(needless)}"


@asynccontextmanager
async def bound(world: Roles, broker: RedisStreamBroker) -> AsyncIterator[None]:
    with use_broker(lambda: Binding(broker, world.registry, TasksConfig())):
        yield
