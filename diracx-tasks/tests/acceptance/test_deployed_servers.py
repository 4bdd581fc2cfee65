"""Configuration files of deploy/redis, with real servers and Sentinels.

Only addresses, ports and directories are other than in the files.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from diracx.tasks.plumbing import BaseTask
from diracx.tasks.plumbing.broker import server_check
from diracx.tasks.plumbing.broker.server_check import report_risks
from diracx.tasks.plumbing.exceptions import SendTaskError
from diracx.tasks.testing import TaskSystem
from diracx.tasks.testing.server import ValkeyProcess
from redis import Redis
from redis.exceptions import RedisError
from support.paths import ROOT
from support.standard_tasks import submitted
from support.waiting import eventually

FILES = ROOT / "deploy" / "redis"
SERVICE = "tasks"
PASSWORD = "correct-horse"
DELAY = timedelta(seconds=3)


@dataclass
class Add(BaseTask):
    number: int

    async def execute(self) -> int:
        return self.number + 1


def deployed(name: str, directory: Path, *options: str, primary: int = 6379) -> ValkeyProcess:
    """A process that goes by a copy of that file, as an operator has one on each machine: with users."""
    directory.mkdir()
    digest = hashlib.sha256(PASSWORD.encode()).hexdigest()
    users = [(FILES / f"acl/{user}.acl").read_text() for user in ("default", "replication", "sentinel")]
    acl = directory / "users.acl"
    acl.write_text("".join(users).replace("SHA256-OF-THE-PASSWORD", digest) + "user test on nopass ~* &* +@all\n")
    text = (FILES / name).read_text()
    for written, meant in (
        (" 127.0.0.1 6379 ", f" 127.0.0.1 {primary} "),
        ("# aclfile /etc/valkey/users.acl", f"aclfile {acl}"),
        ("# masteruser", "masteruser"),
        ("# masterauth", "masterauth"),
        ("# sentinel auth", "sentinel auth"),
        (" PASSWORD", f" {PASSWORD}"),
    ):
        text = text.replace(written, meant)
    copy = directory / Path(name).name
    copy.write_text(text)
    return ValkeyProcess(directory, config=copy, options=options)


def as_test(server: ValkeyProcess) -> str:
    return server.url.replace("//", "//test:any@")


class Replicated:
    """One primary, two replicas and three Sentinels, with the files of deploy/redis/sentinel."""

    def __init__(self, directory: Path) -> None:
        self.primary = deployed("sentinel/server.conf", directory / "one")
        self.primary.start()
        self.replicas = [
            deployed("sentinel/server.conf", directory / name, "--replicaof", "127.0.0.1", str(self.primary.port))
            for name in ("two", "three")
        ]
        self.sentinels = [
            deployed(
                "sentinel/sentinel.conf", directory / f"sentinel-{number}", "--sentinel", primary=self.primary.port
            )
            for number in range(3)
        ]
        for process in (*self.replicas, *self.sentinels):
            process.start()
        self.url = (
            f"redis+sentinel://test:any@{','.join(f'127.0.0.1:{each.port}' for each in self.sentinels)}/{SERVICE}"
        )
        eventually(self.is_complete, "the Sentinels know each other and both replicas")

    def is_complete(self) -> bool:
        for each in self.sentinels:
            with Redis.from_url(each.url) as client:
                state = client.sentinel_master(SERVICE)
            if (state["num-slaves"], state["num-other-sentinels"]) != (2, 2):
                return False
        return self.good_replicas(self.primary) == 2

    def good_replicas(self, server: ValkeyProcess) -> int | None:
        """Number of replicas that have responded in time; None: not a primary."""
        try:
            with Redis.from_url(as_test(server)) as client:
                found = client.info("replication")
        except RedisError:  # a server that is promoted drops its clients
            return None
        return int(found["min_slaves_good_slaves"]) if found["role"] == "master" else None

    def end(self) -> None:
        for process in (*self.sentinels, self.primary, *self.replicas):
            process.kill()


@pytest.fixture
def replicated(tmp_path: Path) -> Iterator[Replicated]:
    made = Replicated(tmp_path)
    yield made
    made.end()


@pytest.fixture
def single(tmp_path: Path) -> Iterator[ValkeyProcess]:
    process = deployed("single.conf", tmp_path / "single")
    process.start()
    yield process
    process.kill()


async def findings(system: TaskSystem, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.set_level("INFO", logger=server_check.__name__)
    await report_risks(system.broker.redis)
    return [record.getMessage() for record in caplog.records if record.name == server_check.__name__]


async def test_a_single_server_has_no_finding_and_loses_nothing_when_it_is_killed(
    single: ValkeyProcess, caplog: pytest.LogCaptureFixture
) -> None:
    async with TaskSystem([Add], redis_url=as_test(single), workers=0, scheduler=False) as system:
        assert await findings(system, caplog) == []
        ids = [await Add(number).schedule() for number in range(20)]
    single.kill()
    single.start()
    async with TaskSystem([Add], redis_url=as_test(single)) as system:
        results = [await system.result(task_id) for task_id in ids]
    assert [result.return_value for result in results] == [number + 1 for number in range(20)]


async def test_a_failover_loses_nothing_that_was_replicated_and_workers_go_on(
    replicated: Replicated, caplog: pytest.LogCaptureFixture
) -> None:
    async with TaskSystem([Add], redis_url=replicated.url) as system:
        assert await findings(system, caplog) == []
        waiting = [await Add(number).schedule(at_time=datetime.now(UTC) + DELAY) for number in range(20)]
        with Redis.from_url(as_test(replicated.primary)) as primary:
            assert primary.wait(2, 30_000) == 2
        replicated.primary.kill()

        def writable() -> bool:
            return any(replicated.good_replicas(each) for each in replicated.replicas)

        await asyncio.to_thread(eventually, writable, "a replica is promoted and the other follows it", 60.0)
        results = [await system.result(task_id, 60) for task_id in waiting]
        assert [result.return_value for result in results] == [number + 1 for number in range(20)]
        later = await submitted(Add(1))
        assert (await system.result(later, 60)).return_value == 2
        caplog.clear()
        assert await findings(system, caplog) == [], "the new primary has the same settings"


async def test_a_primary_that_lost_its_replicas_accepts_no_tasks_and_goes_on_when_one_is_back(
    replicated: Replicated,
) -> None:
    async with TaskSystem([Add], redis_url=replicated.url) as system:
        accepted = [await Add(0).schedule()]
        for replica in replicated.replicas:
            os.kill(replica.pid, signal.SIGSTOP)
        with pytest.raises(SendTaskError, match=r"(?i)enough good replicas"):  # noqa: PT012  # within seconds
            async with asyncio.timeout(30):
                while True:
                    accepted.append(await Add(0).schedule())
                    await asyncio.sleep(0.05)
        os.kill(replicated.replicas[0].pid, signal.SIGCONT)
        accepted.append(await submitted(Add(0)))
        for task_id in accepted:
            assert (await system.result(task_id, 60)).return_value == 1
