"""Outcomes of executions, for any exception and handling of cancellations."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from types import ModuleType
from typing import Annotated, Any, ClassVar, cast

import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    ExponentialBackoff,
    MutexLock,
    NoRetry,
    RetryPolicyBase,
    StopRetryingError,
    TaskRetryRequestedError,
    spawn_with_callback,
)
from diracx.tasks.plumbing.base_task import current_message
from diracx.tasks.plumbing.broker.models import LockSpec
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.plumbing.messages.error_info import describe_exception
from diracx.tasks.plumbing.worker.settlement import retry_at, truncate_attempts
from diracx.tasks.testing import TaskSystem
from fastapi import Depends
from redis.asyncio import Redis
from support.raised_exceptions import RAISED, Panic
from support.standard_tasks import SEEN
from support.waiting import until

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")
RUNS: list[str] = []
SUBMITTED: set[str] = set()


@pytest.fixture(autouse=True)
def _forget() -> None:
    SEEN.clear()
    RUNS.clear()
    SUBMITTED.clear()


@dataclass
class Raises(BaseTask):
    """Raises in one of the places where code of its author runs."""

    what: str
    where: str

    retry_policy = ExponentialBackoff(base_delay_seconds=0.01, max_retries=2)
    dlq_eligible = True

    def __post_init__(self) -> None:
        self._raise("__init__")

    def _raise(self, where: str) -> None:
        if where == self.where and self.what in SUBMITTED:
            raise RAISED[self.what]()

    def serialize(self) -> tuple[Any, ...]:
        SUBMITTED.add(self.what)
        return self.what, self.where

    @property
    def execution_locks(self) -> list[BaseLock]:
        self._raise("execution_locks")
        return [MutexLock(JOB, f"{self.what} {self.where}")]

    @property
    def vo(self) -> str:
        self._raise("vo")
        return "vo"

    async def execute(self, dependency: Annotated[None, Depends(lambda: None)]) -> None:
        RUNS.append(self.what)
        self._raise("execute")


def _error() -> BaseException:
    """Return the exception that the running task is to raise."""
    message = current_message.get()
    assert message is not None
    return RAISED[message.task_args[0]]()


def _set_up() -> None:
    raise _error()


class InSetUp(Raises):
    async def execute(self, dependency: Annotated[None, Depends(_set_up)]) -> None:
        raise AssertionError("must not run")


async def _tear_down() -> AsyncIterator[None]:
    yield
    raise _error()


class InTearDown(Raises):
    async def execute(self, dependency: Annotated[None, Depends(_tear_down)]) -> None:
        pass


class HostilePolicy(RetryPolicyBase):
    def schedule_retry(self, attempt: int, exception: Exception) -> datetime | None:
        raise _error()


class InPolicy(Raises):
    retry_policy = HostilePolicy()

    async def execute(self, **_: Any) -> None:
        raise ValueError("the policy raises, too")


@dataclass
class Value:
    field: int = 1

    def __getattribute__(self, name: str) -> Any:
        if name == "field":
            raise _error()
        return super().__getattribute__(name)


class InResult(Raises):
    async def execute(self, **_: Any) -> Value:
        return Value()


@dataclass
class Note(BaseTask):
    what: str

    async def execute(self) -> str:
        SEEN.append(self.what)
        return self.what


#: The class, where it raises by itself, and the error that its group gets.
WHERE: dict[str, tuple[type[Raises], str, str]] = {
    "execute": (Raises, "execute", "failed"),
    "__init__": (Raises, "__init__", "failed"),
    "execution_locks": (Raises, "execution_locks", "failed"),
    "dependency's set-up": (InSetUp, "", "failed"),
    "dependency's tear-down": (InTearDown, "", "failed"),
    "retry policy": (InPolicy, "", "failed"),
    "result": (InResult, "", "succeeded"),
    "vo": (Raises, "vo", "succeeded"),
}


@pytest.mark.parametrize("where", WHERE)
async def test_any_exception_of_a_task_is_reported_and_leaves_no_state(
    redis_url: str, redis: Redis, where: str
) -> None:
    task_class, place, expected = WHERE[where]
    settings = {"max_concurrent_tasks": 4}  # fewer than there are tasks: a slot that stays occupied is missed
    async with TaskSystem([task_class, Note], redis_url=redis_url, workers=1, settings=settings) as system:
        for what in RAISED:
            task = object.__new__(task_class)
            vars(task).update(what=what, where=place)
            await spawn_with_callback([task], Note(f"{what}: succeeded"), on_failure=Note(f"{what}: failed"))
        # A retry that is not due yet does not keep `drain` waiting.
        await system.unless_dead(until(lambda: len(SEEN) >= len(RAISED)))
        await system.drain()
        assert sorted(SEEN) == sorted(f"{what}: {expected}" for what in RAISED)
    assert not [key async for key in redis.scan_iter("lock:*")]


@pytest.mark.parametrize("what", ["KeyboardInterrupt", "no text", "Panic", "long"])
async def test_any_exception_is_retried_if_the_policy_allows_it(redis_url: str, what: str) -> None:
    async with TaskSystem([Raises], redis_url=redis_url, workers=1) as system:
        task_id = await Raises(what, "execute").schedule()
        await system.result(task_id)
        assert [what] * 3 == RUNS
        assert system.task_db is not None
        async with system.task_db as db:
            [dead_letter] = await db.search()
        assert len(dead_letter["attempts"]) == 3
        assert len(dead_letter["message"]) < 100_000


@pytest.mark.parametrize("what", RAISED)
def test_describing_an_exception_never_raises_and_is_never_long(what: str) -> None:
    description = describe_exception(RAISED[what]())
    assert all(type(text) is str and len(text) <= 8_100 for text in description.values())
    assert description["traceback"]


def test_a_long_message_leaves_the_frames_in_the_traceback() -> None:
    try:
        raise RAISED["long"]()
    except ValueError as error:
        description = describe_exception(error)
    assert "test_a_long_message" in description["traceback"]
    assert description["message"].endswith("…")


def test_all_attempts_are_kept_and_the_oldest_are_shortened() -> None:
    attempts = [{"type": "E", "message": "m" * 4000, "traceback": "t" * 4000, "host": str(n)} for n in range(1000)]
    kept = truncate_attempts(attempts)
    assert [attempt["host"] for attempt in kept] == [str(n) for n in range(1000)]
    assert kept[-1] == attempts[-1]
    assert len(kept[0]["traceback"]) == 0
    assert sum(len(str(attempt)) for attempt in kept) < 500_000


class Counts(BaseTask):
    """Handles the failure of a TaskGroup, and does other things to its own cancellation."""

    async def execute(self) -> str:
        for _ in range(3):
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._fail())
                    await asyncio.sleep(60)
            except* ValueError:
                SEEN.append("handled")
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        except TimeoutError:
            SEEN.append("timed out")
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            SEEN.append("swallowed its own")
        task.uncancel()
        task.uncancel()
        return "done"

    async def _fail(self) -> None:
        raise ValueError


@pytest.mark.parametrize("limit", [None, 30.0])
async def test_a_task_that_cancels_itself_and_takes_it_back_succeeds(redis_url: str, limit: float | None) -> None:
    class Limited(Counts):
        time_limit_seconds = limit

    async with TaskSystem([Limited], redis_url=redis_url, workers=1) as system:
        result = await system.result(await Limited().schedule())
    assert result.return_value == "done", result.error
    assert SEEN == ["handled"] * 3 + ["timed out", "swallowed its own"]


class Evades(BaseTask):
    """Takes its time limit for something else, in one of several ways."""

    time_limit_seconds = 0.1

    def __init__(self, how: str) -> None:
        self.how = how

    async def execute(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            match self.how:
                case "uncancel":
                    try:
                        await asyncio.sleep(60)
                    finally:
                        task.uncancel()
                case "timeout":
                    async with asyncio.timeout(60):
                        await asyncio.sleep(60)
                case "group":
                    async with asyncio.TaskGroup() as group:
                        group.create_task(asyncio.sleep(60))
                case _:
                    await asyncio.sleep(60)
        except asyncio.CancelledError:
            if self.how == "another error":
                raise ValueError("cannot clean up") from None
            if self.how != "swallow":
                raise


@pytest.mark.parametrize("how", ["uncancel", "timeout", "group", "another error", "swallow", ""])
async def test_an_exceeded_time_limit_is_reported_whatever_the_task_raises(redis_url: str, how: str) -> None:
    async with TaskSystem([Evades], redis_url=redis_url, workers=1) as system:
        result = await system.result(await Evades(how).schedule())
    assert result.error is not None
    assert result.error["type"] == "TimeLimitExceededError"


class CleansUpBadly(BaseTask):
    retry_policy = ExponentialBackoff(base_delay_seconds=0.01, max_retries=3)

    async def execute(self) -> None:
        SEEN.append("began")
        try:
            await asyncio.sleep(60)
        finally:
            raise ValueError("cannot clean up")


async def test_a_cancelled_task_is_not_retried_for_an_error_of_its_clean_up(redis_url: str) -> None:
    async with TaskSystem([CleansUpBadly], redis_url=redis_url, workers=1) as system:
        task_id = await CleansUpBadly().schedule()
        await until(lambda: SEEN)
        await system.cancel(task_id)
        result = await system.result(task_id)
        await system.drain()
    assert result.error is not None
    assert result.error["type"] == "TaskCancelledError"
    assert SEEN == ["began"]


class _Stop(StopRetryingError):
    pass


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ExceptionGroup("", [StopRetryingError()]), False),
        (ExceptionGroup("", [_Stop(), ExceptionGroup("", [StopRetryingError()])]), False),
        (ExceptionGroup("", [StopRetryingError(), TaskRetryRequestedError()]), False),
        (ExceptionGroup("", [StopRetryingError(), ValueError()]), True),
        (ExceptionGroup("", [ValueError()]), True),
        (BaseExceptionGroup("", [StopRetryingError(), KeyboardInterrupt()]), True),
    ],
)
def test_a_group_of_errors_ends_the_retries_when_all_in_it_do(error: BaseException, again: bool) -> None:
    assert (retry_at(ExponentialBackoff(), 0, error) is not None) == again


def test_a_group_of_requested_retries_is_a_requested_retry() -> None:
    deep: Exception = TaskRetryRequestedError()
    for _ in range(50):
        deep = ExceptionGroup("", [deep, TaskRetryRequestedError()])
    assert retry_at(NoRetry(), 0, deep) is not None
    assert retry_at(NoRetry(), 0, ExceptionGroup("", [deep, ValueError()])) is None


class Mutates(BaseTask):
    retry_policy = ExponentialBackoff(base_delay_seconds=0.01, max_retries=1)

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    async def execute(self) -> None:
        SEEN.append(list(self.values))
        self.values.append(object())
        raise ValueError


async def test_a_retry_has_the_arguments_of_the_submission_whatever_the_task_did_to_them(redis_url: str) -> None:
    async with TaskSystem([Mutates], redis_url=redis_url, workers=1) as system:
        await system.result(await Mutates([1]).schedule())
    assert SEEN == [[1], [1]]


@dataclass
class ChangesLabels(BaseTask):
    labels: dict[str, Any]
    fails: bool

    retry_policy = ExponentialBackoff(base_delay_seconds=0.01, max_retries=1)

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, "one")]

    async def execute(self) -> None:
        message = current_message.get()
        assert message is not None
        message.labels.update(self.labels)
        if self.fails:
            raise ValueError


@pytest.mark.parametrize("labels", [{"result_ttl_seconds": "long"}, {"child_results": 5}, {"attempts": 5}])
async def test_a_task_ends_and_releases_its_lock_whatever_it_did_to_its_labels(
    redis_url: str, labels: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", ModuleType("sdk"))  # retries are noted in spans
    async with TaskSystem([ChangesLabels], redis_url=redis_url, workers=1) as system:
        ids = [await ChangesLabels(labels, fails).schedule() for fails in (False, True)]
        results = [await system.result(task_id, 10) for task_id in ids]
    assert [result.is_err for result in results] == ["attempts" not in labels, True]


class OddLock(MutexLock):
    odd: ClassVar[dict[str, Any]]

    def spec(self) -> LockSpec:
        return cast(LockSpec, {**super().spec(), **self.odd})

    def __copy__(self) -> OddLock:
        raise Panic


class Odd(BaseTask):
    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, "even"), OddLock(JOB, "odd")] if SUBMITTED else []

    def serialize(self) -> tuple[Any, ...]:
        SUBMITTED.add("odd")
        return ()

    async def execute(self) -> None:
        raise AssertionError("must not run")


@pytest.mark.parametrize(
    "odd", [{"kind": "invalid"}, {"key": object()}, {"owner": None}, {"ttl_ms": "long"}, {"ttl_ms": 10**30}, {}]
)
async def test_an_unknown_lock_type_is_reported_and_leaves_no_keys(
    redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch, odd: dict[str, Any]
) -> None:
    monkeypatch.setattr(OddLock, "odd", odd, raising=False)
    async with TaskSystem([Odd, Note], redis_url=redis_url, workers=1) as system:
        result = await system.result(await Odd().schedule())
        assert result.error is not None
        assert result.error["type"] == "TaskRejectedError"
        assert (await system.result(await Note("after").schedule())).return_value == "after"
        await system.drain()
    assert not [key async for key in redis.scan_iter("lock:*")]


async def test_a_time_limit_that_is_no_number_is_the_outcome(redis_url: str) -> None:
    class Unlimited(BaseTask):
        time_limit_seconds = cast(float, "an hour")

        async def execute(self) -> None:
            raise AssertionError("must not run")

    async with TaskSystem([Unlimited], redis_url=redis_url, workers=1) as system:
        result = await system.result(await Unlimited().schedule())
    assert result.error is not None
    assert result.error["type"] == "TypeError"
