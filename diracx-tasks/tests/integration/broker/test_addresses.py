"""All kinds of Redis addresses, with real servers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from diracx.tasks.plumbing import BaseTask, IntervalSeconds, PeriodicBaseTask
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.testing import TaskSystem, embedded_redis
from redis import Redis
from support.waiting import until


class Echo(BaseTask):
    async def execute(self) -> int:
        await asyncio.sleep(0.01)
        return 42


TICKS: list[None] = []


class Tick(PeriodicBaseTask):
    default_schedule = IntervalSeconds(0.1)

    async def execute(self) -> None:
        TICKS.append(None)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    socket = tmp_path_factory.mktemp("s") / "it@s.sock"
    with embedded_redis("--unixsocket", str(socket)) as url:
        with Redis.from_url(url) as client:
            client.acl_setuser(  # type: ignore[no-untyped-call]
                "us:er", enabled=True, passwords=["+p@/?#ss"], categories=["+@all"], keys=["*"], channels=["*"]
            )
        yield url, socket


@pytest.mark.parametrize(
    "form",
    [
        "unix://{socket}",
        "unix://us%3Aer:p%40%2F%3F%23ss@{socket}?db=2",
        "unix://{socket}?max_connections=2&username=us:er&password=p%40/?%23ss",
        "redis://us%3Aer:p%40%2F%3F%23ss@127.0.0.1:{port}",
        "REDIS://localhost:{port}/1?health_check_interval=1&client_name=me&socket_keepalive=no&socket_timeout=1",
        " valkey://127.0.0.1:{port}/0\n",
    ],
)
async def test_worker_and_scheduler_work_through_every_form_of_address(
    server: tuple[str, Path], form: str
) -> None:
    port = server[0].rpartition(":")[2]
    TICKS.clear()
    async with TaskSystem([Echo, Tick], redis_url=form.format(socket=server[1], port=port)) as system:
        ids = await asyncio.gather(*(Echo().schedule() for _ in range(8)))
        results = await asyncio.gather(*(system.result(task_id) for task_id in ids))
        assert {result.return_value for result in results} == {42}
        await until(lambda: len(TICKS) >= 3)


@pytest.mark.parametrize("connections", [2, 6])
async def test_callers_wait_for_a_free_connection_when_there_are_few(redis_url: str, connections: int) -> None:
    limited = f"{redis_url}?max_connections={connections}"
    async with TaskSystem([Echo, Tick], redis_url=limited, workers=1) as system:
        ids = await asyncio.gather(*(Echo().schedule() for _ in range(100)))
        # Each waits on a channel of its own, which must not keep a connection from commands.
        results = await asyncio.gather(*(system.result(task_id) for task_id in ids))
        assert {result.return_value for result in results} == {42}


async def test_too_few_connections_are_refused(redis_url: str) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        RedisStreamBroker(redis_url, max_connection_pool_size=1)
    with pytest.raises(ValueError, match="decode_responses"):
        RedisStreamBroker(redis_url, decode_responses=True)
