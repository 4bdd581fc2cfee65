"""Secret arguments are removed from stored errors."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

import pytest
from diracx.tasks import operations as monitor
from diracx.tasks.plumbing import (
    BaseTask,
    CallbackSpawner,
    ExponentialBackoff,
    IntervalSeconds,
    PeriodicBaseTask,
    schedule_many,
)
from diracx.tasks.plumbing._util.secrets import MASK
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.broker.groups import list_groups
from diracx.tasks.plumbing.messages.secrets import without_secrets
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.waiting import until

SECRET = "open'sesame"


@dataclass
class Broken(BaseTask):
    password: str
    secret_fields = frozenset({"password"})
    dlq_eligible = True

    async def execute(self) -> None:
        raise ValueError(f"refused {self.password} ({self.password!r})")


@dataclass
class Retried(Broken):
    retry_policy = ExponentialBackoff(base_delay_seconds=3600, max_retries=1)


@dataclass
class Counting(BaseTask):
    """Does not take everything."""

    password: int
    secret_fields = frozenset({"password"})
    dlq_eligible = True

    async def execute(self) -> None: ...


class Often(PeriodicBaseTask):
    default_schedule = IntervalSeconds(0.5)
    secret_fields = frozenset({"password"})
    password = SECRET

    async def execute(self) -> None:
        raise ValueError(f"refused {self.password}")


class Parent(BaseTask):
    async def execute(self, spawn: CallbackSpawner) -> str:
        return await spawn([Broken(SECRET)], Broken(SECRET))


TASKS = [Broken, Retried, Counting, Often, Parent]


async def everything(redis: Redis) -> str:
    """Read all that the server keeps, but the arguments in messages."""
    found: list[Any] = [
        await redis.hgetall(keys.OUTCOMES),
        [vars(each) if hasattr(each, "__dict__") else repr(each) for each in await list_groups(redis)],
        repr(await monitor.failures(redis)),
    ]
    return repr(found)


@pytest.mark.leaves_keys("diracx:tasks:*")
async def test_no_text_about_an_error_has_the_secret_in_it(redis_url: str, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    async with TaskSystem(TASKS, redis_url=redis_url, workers=1) as system:
        redis = system.broker.redis
        [plain] = await schedule_many([Broken(SECRET)], labels={"result_ttl_seconds": 60})
        await Parent().schedule()
        await Retried(SECRET).schedule()
        await Counting(SECRET).schedule()  # which is no number
        result = await system.result(plain)
        assert result.error is not None
        assert result.error["message"] == f"refused {MASK} ({MASK})"
        assert "ValueError" in result.error["traceback"]
        await until(lambda: redis.exists(keys.OUTCOMES))
        await until(lambda: list_groups(redis))
        await system.drain()
        assert system.task_db is not None
        async with system.task_db as db:
            dead_letters = await db.search()
        reported = json.dumps(result.error) + repr([(each["detail"], each["attempts"]) for each in dead_letters])
        reported += await everything(redis) + caplog.text
    assert MASK in reported
    assert "sesame" not in reported


def test_secrets_are_found_however_they_are_written() -> None:
    @dataclass
    class Task(BaseTask):
        login: Any
        secret_fields = frozenset({"login"})

    pair = Task({"user": "me", "key": "sesame"})
    assert without_secrets("as {'user': 'me', 'key': 'sesame'}", pair) == f"as {MASK}"
    assert without_secrets("key sesame of me", pair) == f"key {MASK} of me"
    assert without_secrets(r"b'a\x00b' a", Task(b"a\x00b")) == f"{MASK} a"
    assert without_secrets(r"'a\nb'", Task("a\nb")) == MASK
    assert without_secrets("12345 of 6", Task(12345)) == f"{MASK} of 6"
    assert without_secrets("None of it", Task(None)) == "None of it"
