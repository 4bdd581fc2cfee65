"""Each role does its whole work as its user of deploy/redis/acl, and is refused what is another role's."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
from dashboard_world import until
from diracx.tasks import operations as monitor
from diracx.tasks.operations.audit import audited, read_audit
from diracx.tasks.plumbing import BaseTask, schedule_many, spawn_with_callback
from diracx.tasks.plumbing.base_task import use_broker
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.broker.scripts import script
from diracx.tasks.plumbing.config import TasksConfig
from diracx.tasks.plumbing.config.sources import ConfigReader
from diracx.tasks.plumbing.persistence import TaskDB
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.submission.client import Binding
from diracx.tasks.testing.server import ValkeyProcess, free_port
from diracx.tasks.web.auth.backends import Principal, Role, TokenBackend
from diracx.tasks.web.context import AppContext
from diracx.tasks.web.dashboard import create_app
from diracx.tasks.web.dashboard.pages import PAGES
from redis import Redis
from redis.exceptions import ResponseError

from .conftest import Background, Cli

ROOT = Path(__file__).parents[3]
FILES = ROOT / "deploy" / "redis" / "acl"
PAGE = ROOT / "docs" / "how-to" / "restrict-redis.md"
LUA = files("diracx.tasks.plumbing.broker") / "lua"
ROLES = ("submitter", "worker", "scheduler", "dashboard")
PASSWORD = "correct-horse"  # of all roles in these tests
#: What a client sends whatever it is for: to connect, and to run a script.
BASIC = {
    *("auth", "client|setinfo", "client|setname", "discard", "eval", "evalsha", "hello", "ping"),
    *("quit", "select", "unsubscribe", "unwatch"),
}

#: Scripts that take an accident, or a caller outside of tasks and routes.
RARELY = {"blocked", "extend", "fail_children", "finished", "fire", "recover", "acquire", "release", "task_ids"}
# A worker looks at the lines of locks only where one of them is due while no scheduler leads.
RARELY |= {"lines"}
#: What is sent when there are groups after a change of the server, or one of their children cannot be read; and
#: when an answer was lost.
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


# --- what is written: the files, the scripts, the page ----------------------------------------------------------


def rules(role: str) -> list[str]:
    """The rules of a role's user."""
    user, name, *found = (FILES / f"{role}.acl").read_text().split()
    assert (user, name) == ("user", f"diracx-{role}")
    return found


def allowed(role: str) -> set[str]:
    """The commands that a role may send."""
    return {rule.strip("()")[1:] for rule in rules(role) if rule.startswith("+")}


def scripts_of(role: str) -> set[str]:
    """The scripts of a role, as the page has them."""
    found = re.search(rf"^\| `{role}` \| [^|]* \| ([^|]*) \|", PAGE.read_text(), re.MULTILINE)
    assert found, f"{PAGE} has no row for {role}"
    return set(re.findall(r"`(\w+)`", found[1]))


def commands_in(name: str) -> set[str]:
    """The commands that a script may call, those of what it includes among them."""
    text = (LUA / f"{name}.lua").read_text()
    found = set()
    for command, word in re.findall(r"redis\.p?call\(\s*['\"](\w+)['\"](?:\s*,\s*['\"](\w+)['\"])?", text):
        found.add(_named([command, word]))
    for parts in re.findall(r"#include (.+)", text):
        found |= {command for part in parts.split() for command in commands_in(part)}
    return found


def _named(words: list[str]) -> str:
    name = words[0].lower()
    return f"{name}|{words[1].lower()}" if name in ("client", "xinfo", "xgroup") else name


def test_every_script_has_a_role_and_each_role_may_send_what_its_scripts_do() -> None:
    names = {file.name[:-4] for file in LUA.iterdir() if not file.name.startswith("_")}
    assert set().union(*map(scripts_of, ROLES)) == names
    for role in ROLES:
        missing = {command for name in scripts_of(role) for command in commands_in(name)} - allowed(role)
        assert not missing, f"{role}.acl lacks {sorted(missing)}"


def test_no_role_may_do_what_is_an_administrators() -> None:
    for role in ROLES:
        found = rules(role)
        assert {"resetkeys", "resetchannels", "-@all"} <= set(found)
        assert not {"~*", "allkeys", "&*", "allchannels", "+@all", "nopass"} & set(found)
        assert not [rule for rule in found if rule.startswith("+@")], "categories grow with the server's version"
        assert not allowed(role) & {
            *("keys", "scan", "flushall", "flushdb", "config", "acl", "script", "function", "debug", "monitor"),
            *("shutdown", "save", "replicaof", "migrate", "restore", "swapdb", "module", "client|kill", "rename"),
        }


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
                self.sent[role].add(_named(words))
                if words[0] == "EVALSHA" and words[1] in names:
                    self.scripts[role].add(names[words[1]])

    def start(self) -> None:
        self._thread.start()

    def end(self, admin: Redis) -> None:
        admin.echo("end")
        assert self._ends.wait(30)


# --- a server with those users ----------------------------------------------------------------------------------


@dataclass
class Server:
    """A server that has loaded the files of `deploy/redis/acl`, and beside them a user for this test."""

    process: ValkeyProcess
    admin: Redis

    def url(self, role: str) -> str:
        """The URL of a role. Its connections are named after it."""
        port = self.process.port
        return f"redis://diracx-{role}:{PASSWORD}@127.0.0.1:{port}?client_name={role}"

    def client(self, role: str) -> Redis:
        return Redis.from_url(self.url(role))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    digest = hashlib.sha256(PASSWORD.encode()).hexdigest()
    lines = [(FILES / f"{name}.acl").read_text() for name in ("default", *ROLES)]
    text = "".join(lines).replace("SHA256-OF-THE-PASSWORD", digest)
    acl = tmp_path / "users.acl"
    acl.write_text(text + "user test on nopass ~* &* +@all\n")
    process = ValkeyProcess(tmp_path, options=("--aclfile", str(acl)))
    process.start()
    try:
        with Redis.from_url(f"redis://test:any@127.0.0.1:{process.port}", socket_timeout=None) as admin:
            yield Server(process, admin)
    finally:
        process.stop()


def test_a_file_without_a_password_is_not_loaded_and_nobody_gets_in_without_a_name(
    server: Server, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match=r"(?i)NOAUTH|authenticat"):
        Redis(port=server.process.port).ping()
    (tmp_path / "users.acl").write_text((FILES / "worker.acl").read_text())
    with pytest.raises(Exception, match=r"(?i)password hash|error"):
        server.admin.acl_load()


# --- what each role is refused ----------------------------------------------------------------------------------

#: Role -> commands that are another role's, or an administrator's.
REFUSED = {
    "submitter": [
        "XRANGE diracx:tasks:normal:medium - +",  # what others have submitted
        "XREADGROUP GROUP diracx:tasks:workers x STREAMS diracx:tasks:normal:medium >",
        "XDEL diracx:tasks:normal:medium 1-1",
        "DEL diracx:tasks:normal:medium",
        "SET diracx:results:x forged",
        "DEL lock:mutex:job:42",
        "GET lock:mutex:job:42",
        "SET diracx:scheduler:leader me",
        "HSET diracx:scheduler:paused all 1",
        "XADD diracx:tasks:audit * data forged",
        "XADD diracx:tasks:dead-letters * data forged",
        "ZADD diracx:tasks:cancelled 1 x",
        "ZADD diracx:tasks:alive 1 x",
        "HGETALL diracx:tasks:config-in-force",
        "PUBLISH diracx:tasks:cancelled x",
        "SUBSCRIBE diracx:tasks:cancelled",
        "GET another:application",
    ],
    "worker": [
        "XADD diracx:tasks:audit * data forged",
        "XRANGE diracx:tasks:audit - +",
        "SET diracx:scheduler:leader me",
        "ZADD diracx:scheduler:next 1 x",
        "HSET diracx:scheduler:paused all 1",
        "SET diracx:tasks:resubmitted:x 1",
        "PUBLISH diracx:scheduler:leader free",
        "SET another:application 1",
    ],
    "scheduler": [
        "GET diracx:results:x",
        "GET lock:mutex:job:42",
        "DEL lock:mutex:job:42",
        "ZADD diracx:tasks:alive 1 x",
        "ZADD diracx:tasks:cancelled 1 x",
        "XADD diracx:tasks:audit * data forged",
        "XADD diracx:tasks:dead-letters * data forged",
        "XREADGROUP GROUP diracx:tasks:workers x STREAMS diracx:tasks:normal:medium >",
        "SET another:application 1",
    ],
    "dashboard": [
        "SET diracx:scheduler:leader me",
        "ZADD diracx:scheduler:next 1 x",
        "ZADD diracx:tasks:alive 1 x",
        "HSET diracx:monitor:worker:x line forged",
        "HSET diracx:tasks:config-in-force x forged",
        "XADD diracx:tasks:dead-letters * data forged",
        "XREADGROUP GROUP diracx:tasks:workers x STREAMS diracx:tasks:normal:medium >",
        "PUBLISH diracx:scheduler:leader free",
        "GET another:application",
    ],
}
ADMINISTRATORS = [
    *(
        "FLUSHALL",
        "FLUSHDB",
        "KEYS *",
        "SCAN 0",
        "CONFIG GET *",
        "CONFIG SET maxmemory 1",
        "ACL LIST",
        "ACL WHOAMI",
    ),
    *(
        "MONITOR",
        "SHUTDOWN",
        "SAVE",
        "SCRIPT FLUSH",
        "SCRIPT KILL",
        "FUNCTION LIST",
        "SWAPDB 0 1",
    ),
    *("CLIENT KILL TYPE normal", "CLIENT LIST", "REPLICAOF NO ONE", "RENAME a b", "MIGRATE h 1 k 0 1"),
]


@pytest.mark.parametrize("role", ROLES)
def test_each_role_is_refused_what_is_not_its_own_by_a_script_too(server: Server, role: str) -> None:
    done = []
    for line in (*REFUSED[role], *ADMINISTRATORS):
        words = line.split()
        # A script declares no keys here, and has no more rights than its sender.
        as_script = ("EVAL", f"return redis.call({', '.join(map(repr, words))})", 0)
        for command in (words, as_script):
            with server.client(role) as client:
                try:
                    client.execute_command(*command)
                except ResponseError as error:
                    if re.search(
                        r"(?i)permission|can't (run|access)|not allowed from script|unknown command", str(error)
                    ):
                        continue
                    done.append(f"{line}: {error}")
                else:
                    done.append(line)
    assert not done


@pytest.mark.parametrize("category", ["admin", "dangerous"])
def test_no_role_needs_the_commands_that_managed_servers_keep_to_themselves(server: Server, category: str) -> None:
    kept = {command.lower().replace("|", " ") for command in server.admin.acl_cat(category)}
    for role in ROLES:
        assert {command.replace("|", " ") for command in allowed(role)} & kept <= {"info"}


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

    def __init__(self, server: Server, cli: Cli, db_url: str) -> None:
        self.server = server
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
        """A port for metrics, of which all are asked for at the end."""
        self.ports.append(free_port())
        return str(self.ports[-1])

    def worker(self, **environment: str) -> Background:
        options = ("--worker-size", "medium", "--lease-seconds", "2", "--max-concurrent-tasks", "20")
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
    from diracx.tasks.web.api.audit_logger import _USER, UserActionRate

    db = TaskDB(world.db_url)

    async def this() -> AppContext:
        return AppContext(broker, world.registry, ConfigReader(), db)

    app = create_app(this, TokenBackend({"token": Principal("wilma", Role.WRITE, None)}, ""), extensions=[])
    transport = httpx.ASGITransport(app)
    async with db.engine_context(), httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        await client.post("/sign-in", data={"credential": "token"})
        queued = await world.tasks.Quick(1).schedule(at_time=datetime.now(UTC) + timedelta(hours=1))
        await schedule_many([world.tasks.Quick(number) for number in range(3)])
        group = await spawn_with_callback([world.tasks.Held()], world.tasks.Collect())
        values = {"queue": "normal:medium", "group": group, "dead_letter": "1"}
        for page in PAGES:
            path = re.sub(r"\{(\w+)\}", lambda found: values[found[1]], page.path)
            answer = await client.get(path, params={"key": "lock:mutex:task:held"} if path == "/locks/one" else {})
            assert answer.status_code == 200, f"{path}: {answer.text}"
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
            answer = await client.post(path, data=data)
            assert "%22ok%22%3A%20true" in answer.headers.get("set-cookie", ""), f"{path}: {answer.headers}"
        assert len(await read_audit(broker.redis)) == 8

        async def nothing() -> str:
            return "nothing"

        assert await UserActionRate(_USER, "lhcb:fred").acquire(broker.redis)
        await audited(broker.redis, "fred", "api", "submit pilot", "ce", nothing, vo="lhcb")
        assert await read_audit(broker.redis, vo="lhcb")
    await app.aclose()


async def test_each_role_does_its_whole_work_and_no_file_allows_what_nothing_needs(
    server: Server, cli: Cli, initialised_task_db: str
) -> None:
    world = Roles(server, cli, initialised_task_db)
    seen = Monitor(Redis.from_url(f"redis://test:any@127.0.0.1:{server.process.port}", socket_timeout=None))
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
    seen.end(server.admin)
    denied = [
        f"{entry['username']}: {entry['object']} ({entry['reason']})"
        for entry in server.admin.acl_log()
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
