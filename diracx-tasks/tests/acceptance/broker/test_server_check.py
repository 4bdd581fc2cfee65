"""Check of the server at the start of a process: usability, and settings that can lose tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from diracx.tasks.plumbing.broker import server_check
from diracx.tasks.plumbing.broker.server_check import (
    Server,
    UnusableServerError,
    obstacle,
    report_changes,
    report_risks,
)
from diracx.tasks.plumbing.submission.client import task_broker
from diracx.tasks.testing.server import ValkeyProcess
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.sentinel import Sentinel
from support.command_line import Cli
from support.waiting import eventually, until

AOF = ("--appendonly", "yes")
PERSISTENCE = "keeps no append-only file: its restart loses accepted tasks; set `appendonly yes`"
REPLICATION = "a primary that is cut off or paused goes on accepting tasks, which a failover loses"
MEMORY = "it deletes tasks and locks"
#: What is wrong with a server, by its options; all of them keep an append-only file unless they say otherwise.
SETTINGS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "as it should be": ((), []),
    "a limit of memory": (("--maxmemory", "100mb", "--maxmemory-policy", "noeviction"), []),
    "fsync of every command": (("--appendfsync", "always"), []),
    "no file": (("--appendonly", "no"), [PERSISTENCE]),
    "snapshots alone": (("--appendonly", "no", "--save", "60 1"), [PERSISTENCE]),
    "no fsync": (("--appendfsync", "no"), ["appendfsync no: a crash of its machine loses"]),
    **{
        policy: (("--maxmemory", "100mb", "--maxmemory-policy", policy), [f"{policy}: {MEMORY} when"])
        for policy in ("allkeys-lru", "allkeys-random", "volatile-lfu", "volatile-ttl")
    },
    "a policy without a limit": (("--maxmemory-policy", "allkeys-lfu"), ["as soon as a maxmemory is set"]),
    "all of it": (
        ("--appendonly", "no", "--maxmemory-policy", "allkeys-lru"),
        [PERSISTENCE, f"allkeys-lru: {MEMORY}"],
    ),
}
#: The same with a replica.
REPLICATED: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "no replica is needed": ((), [REPLICATION]),
    "any lag": (("--min-replicas-to-write", "1", "--min-replicas-max-lag", "0"), [REPLICATION]),
    "a long lag": (
        ("--min-replicas-to-write", "1", "--min-replicas-max-lag", "60"),
        ["min-replicas-max-lag 60: a failover loses the tasks that were accepted in up to 60 s"],
    ),
    "as it should be": (("--min-replicas-to-write", "1", "--min-replicas-max-lag", "2"), []),
}


@contextmanager
def server(directory: Path, *options: str, aof: tuple[str, ...] = AOF) -> Iterator[ValkeyProcess]:
    """A server that is not configured to lose data."""
    directory.mkdir(exist_ok=True)
    process = ValkeyProcess(directory, options=("--availability-zone", "", *aof, *options))
    process.start()
    try:
        yield process
    finally:
        process.kill()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "server"


async def warnings(url: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.set_level("INFO", logger=server_check.__name__)
    async with AsyncRedis.from_url(url) as client:
        await report_risks(client)
    return [record.getMessage() for record in caplog.records if record.name == server_check.__name__]


@pytest.mark.parametrize("name", SETTINGS)
async def test_a_setting_that_can_lose_tasks_is_in_the_one_warning_at_the_start(
    name: str, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options, expected = SETTINGS[name]
    with server(directory, *options) as process:
        lines = await warnings(process.url, caplog)
    assert len(lines) == bool(expected)
    for text in expected:
        assert text in lines[0]


@pytest.mark.parametrize("name", REPLICATED)
async def test_a_failover_that_loses_more_than_the_last_seconds_is_warned_of(
    name: str, directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options, expected = REPLICATED[name]
    with (
        server(directory, *options, "--repl-diskless-sync-delay", "0") as process,
        server(tmp_path / "replica", "--replicaof", "127.0.0.1", str(process.port)),
        Redis.from_url(process.url) as admin,
    ):
        eventually(lambda: admin.info("replication")["connected_slaves"] == 1, "the replica follows")
        lines = await warnings(process.url, caplog)
    assert len(lines) == bool(expected)
    for text in expected:
        assert text in lines[0]


async def test_a_primary_behind_sentinels_is_warned_of_before_its_first_replica_comes(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with server(directory) as process:

        class Known(Sentinel):
            async def discover_master(self, service_name: str) -> tuple[str, int]:
                return "127.0.0.1", process.port

        async with Known([("127.0.0.1", 1)]).master_for("tasks") as client:
            await report_risks(client)
    assert REPLICATION in caplog.text


def test_long_running_processes_warn_once_and_status_prints_the_same_warning(cli: Cli, directory: Path) -> None:
    with server(directory, aof=()) as process:
        cli.environment["DIRACX_TASKS_REDIS_URL"] = process.url
        worker, scheduler = cli.start("worker"), cli.start("scheduler")
        for started, until in ((worker, "ready: "), (scheduler, "leading")):
            started.until(until)
            assert started.output.count("append-only file") == 1
        check = cli("status", "--check")
        assert (check.returncode, check.stdout.splitlines()[0]) == (
            1,
            "WARNING - Redis keeps no append-only file: its restart loses accepted tasks",
        )
        with Redis.from_url(process.url) as admin:  # a reconnection is no new start
            admin.client_kill_filter(_type="normal", skipme=True)
        assert "append-only" not in cli("queue", "list").stderr
        cli.stop()
        assert worker.output.count("append-only file") == scheduler.output.count("append-only file") == 1


async def test_a_replaced_server_is_checked_again(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    process = ValkeyProcess(directory.parent, options=("--availability-zone", "", *AOF))
    process.start()
    async with AsyncRedis.from_url(process.url) as client:
        following = asyncio.create_task(report_changes(client, await report_risks(client), 0.05))
        assert PERSISTENCE not in caplog.text
        process.kill()
        options = ("--availability-zone", "", "--appendonly", "no")
        process = ValkeyProcess(directory.parent, port=process.port, options=options)
        process.start()
        await until(lambda: PERSISTENCE in caplog.text)
        await asyncio.sleep(0.5)  # ten more looks
        assert caplog.text.count(PERSISTENCE) == 1
        following.cancel()
    process.kill()


def test_a_server_that_loses_its_data_on_purpose_is_not_warned_of(cli: Cli, redis_url: str) -> None:
    cli.environment["DIRACX_TASKS_REDIS_URL"] = redis_url
    worker = cli.start("worker")
    worker.until("ready: ")
    assert "append-only" not in worker.output + cli("status").stdout
    cli.stop()


# --- servers that cannot be used --------------------------------------------------------------------------------


def _cluster(directory: Path) -> tuple[str, ...]:
    return ("--cluster-enabled", "yes")


def _replica(directory: Path) -> tuple[str, ...]:
    return ("--replicaof", "127.0.0.1", "1")


def _with_user(*rules: str) -> Callable[[Path], tuple[str, ...]]:
    def options(directory: Path) -> tuple[str, ...]:
        return ("--user", "default", "on", "nopass", "~*", "&*", "+@all", *rules)

    return options


#: What is wrong -> options of the server, what the one line says.
UNUSABLE: dict[str, tuple[Callable[[Path], tuple[str, ...]], list[str]]] = {
    "a cluster": (_cluster, ["is in cluster mode", "use one that is not a cluster"]),
    "a replica": (_replica, ["is a replica, which takes no writes", "name the primary"]),
    "no scripts": (_with_user("-eval", "-evalsha"), ["does not allow its user EVAL", "rights of its role"]),
    "no streams": (_with_user("-@stream"), ["XADD diracx:tasks:", "XREADGROUP", "rights of its role"]),
    "other keys": (_with_user("resetkeys", "~other:*"), ["does not allow its user EXISTS diracx:tasks:delayed"]),
    "no channels": (_with_user("resetchannels"), ["does not allow its user PUBLISH diracx:tasks:wake, SUBSCRIBE"]),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_server_that_cannot_be_used_is_reported_in_one_line_at_the_start(
    cli: Cli, directory: Path, one_line: Callable[..., str], name: str
) -> None:
    options, expected = UNUSABLE[name]
    with server(directory, *options(directory)) as process:
        cli.environment["DIRACX_TASKS_REDIS_URL"] = process.url
        one_line(cli.mine("worker"), 1, f"Redis at {process.url} ", *expected)


@pytest.mark.parametrize("name", ["a cluster", "a replica"])
def test_clients_and_the_check_command_print_the_same_warning(
    cli: Cli, directory: Path, one_line: Callable[..., str], name: str
) -> None:
    options, (expected, _) = UNUSABLE[name]
    with server(directory, *options(directory)) as process:
        cli.environment["DIRACX_TASKS_REDIS_URL"] = process.url
        one_line(cli.mine("scheduler"), 1, expected)
        one_line(cli.mine("submit", "my_tasks:Urgent"), 1, expected)
        one_line(cli("status"), 1, expected)
        check = cli("status", "--check")
        assert check.returncode == 2
        assert f"CRITICAL - Redis {expected}" in check.stdout


async def test_code_that_submits_tasks_is_warned_at_its_start(directory: Path) -> None:
    with (
        server(directory, *_with_user("-zadd")(directory)) as process,
        pytest.raises(UnusableServerError, match="does not allow its user ZADD diracx:tasks:delayed"),
    ):
        async with task_broker(process.url, registry={}):
            pass


def test_a_sentinel_in_place_of_a_server_is_reported_in_one_line(
    cli: Cli, tmp_path: Path, one_line: Callable[..., str]
) -> None:
    config = tmp_path / "sentinel.conf"
    config.write_text("sentinel monitor tasks 127.0.0.1 1 2\n")
    process = ValkeyProcess(tmp_path, config=config, options=("--sentinel",))
    process.start()
    try:
        cli.environment["DIRACX_TASKS_REDIS_URL"] = process.url
        one_line(cli.mine("worker"), 1, "is a Sentinel, not a server", "write redis+sentinel://")
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("version", "usable"), [("6.2.14", False), ("6.3.4", False), ("7.0.0", True), ("7.2.4", True), ("10.1", True)]
)
def test_servers_before_7_are_refused(version: str, usable: bool) -> None:
    problem = obstacle(Server(hello={"version": version, "mode": "standalone", "role": "master"}))
    assert problem is None if usable else f"has version {version}: Redis 7.0 or newer" in str(problem)


# --- users with few rights --------------------------------------------------------------------------------------


async def test_a_user_without_admin_and_dangerous_commands_runs_a_worker_without_noise(
    cli: Cli, directory: Path
) -> None:
    with (
        server(
            directory, "--user", "farm", "on", "nopass", "~*", "&*", "+@all", "-@admin", "-@dangerous"
        ) as process,
        Redis.from_url(process.url) as admin,
    ):
        cli.environment["DIRACX_TASKS_REDIS_URL"] = process.url.replace("//", "//farm:x@")
        worker, scheduler = (cli.start(role, "--module", "my_tasks.py") for role in ("worker", "scheduler"))
        worker.until("ready: ")
        worker.until("tick")
        for started in (worker, scheduler):
            assert "its user may not use INFO" in started.output
            assert "NOPERM" not in started.output
        assert cli.mine("submit", "my_tasks:Spawn").returncode == 0
        worker.until("spawning")
        assert cli("status").returncode == 0
        cli.stop()
        refused = {entry["object"] for entry in admin.acl_log() if entry["username"] == "farm"}
        assert refused <= {"info"}
