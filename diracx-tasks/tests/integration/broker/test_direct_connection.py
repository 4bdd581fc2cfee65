"""Direct connections: responses are not mixed up, lost connections are reopened."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.broker.clients import DirectConnection
from diracx.tasks.plumbing.broker.models import Submission, TaskMessage
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from support.waiting import clients_wait

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")

NORMAL = "diracx:tasks:normal:medium"


@pytest.fixture
async def direct(redis: Redis) -> AsyncIterator[DirectConnection]:
    direct = DirectConnection(redis)
    yield direct
    await direct.close()


async def test_a_refusal_is_one_of_the_replies(direct: DirectConnection) -> None:
    first, refusal, last = await direct.execute(("ECHO", "1"), ("LPOP",), ("ECHO", "2"))
    assert (first, last) == (b"1", b"2")
    assert isinstance(refusal, ResponseError)


async def test_a_caller_after_a_cancelled_one_gets_its_own_reply(direct: DirectConnection, redis: Redis) -> None:
    asking = asyncio.create_task(direct.execute(("BLPOP", "nothing", 60)))
    await clients_wait(redis, command="blpop")
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert await direct.execute(("ECHO", "mine")) == [b"mine"]


async def test_a_caller_after_a_failed_callback_gets_its_own_reply(direct: DirectConnection) -> None:
    def fails(_: int) -> None:
        raise ValueError("no such descriptor")

    with pytest.raises(ValueError, match="no such descriptor"):
        await direct.execute(("ECHO", "another"), sent=fails)
    assert await direct.execute(("ECHO", "mine")) == [b"mine"]


async def test_a_connection_that_the_server_has_closed_is_reopened(direct: DirectConnection, redis: Redis) -> None:
    [number] = await direct.execute(("CLIENT", "ID"))
    await redis.client_kill_filter(_id=str(number))
    for _ in range(100):  # until its end has reached us, it may be used in vain
        try:
            assert await direct.execute(("ECHO", "again")) == [b"again"]
            return
        except RedisConnectionError:
            continue
    raise AssertionError("never made again")


async def test_waiting_for_a_silent_server_ends_with_the_timeout_of_its_client(redis_url: str) -> None:
    async with Redis.from_url(redis_url, socket_timeout=0.5) as impatient:
        direct = DirectConnection(impatient)
        with pytest.raises(RedisTimeoutError):
            await direct.execute(("BLPOP", "nothing", 60))
        await direct.close()


async def test_concurrently_submitted_tasks_all_arrive(redis: Redis, redis_url: str) -> None:
    broker = RedisStreamBroker(redis_url)
    try:
        messages = [TaskMessage(task_id=str(number), task_name="test:Task") for number in range(20)]
        await asyncio.gather(*(broker.submit([Submission(message, NORMAL)]) for message in messages))
        assert await redis.xlen(NORMAL) == 20
    finally:
        await redis.delete(NORMAL)
        await broker.shutdown()
