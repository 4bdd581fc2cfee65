"""Execution of tasks with their locks outside a worker."""

from __future__ import annotations

import asyncio
import inspect
import sys
import time
from dataclasses import dataclass

import diracx.tasks.plumbing as plumbing
import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    LockLostError,
    MutexLock,
    RateLimiter,
    UnableToAcquireLockError,
    load_task_registry,
    task_wrapper,
    validate_registry,
    wrap_task,
)
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.plumbing.standalone import holding
from redis.asyncio import Redis
from support.waiting import until_renewed


class Never(RateLimiter):
    limit = 1
    window_seconds = 600.0


@dataclass
class Locked(BaseTask):
    number: int

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, self.number), Never(JOB, self.number)]

    async def execute(self, factor: int = 2) -> int:
        return self.number * factor


async def test_task_runs_under_its_locks_and_releases_them(redis: Redis) -> None:
    assert await task_wrapper(Locked, 21, _redis=redis) == 42
    assert await redis.keys("lock:*") == []
    with pytest.raises(UnableToAcquireLockError, match="limiter:rate:job:21"):
        await task_wrapper(Locked, 21, _redis=redis)


async def test_interactive_mode_skips_limiters_but_not_locks(redis: Redis) -> None:
    for _ in range(3):
        assert await task_wrapper(Locked, 5, _redis=redis, _interactive=True, factor=3) == 15
    other = MutexLock(JOB, 5)
    assert await other.acquire(redis)
    with pytest.raises(UnableToAcquireLockError):
        await task_wrapper(Locked, 5, _redis=redis, _interactive=True)
    await other.release(redis)


def test_wrapped_task_shows_the_dependencies_of_execute() -> None:
    assert list(inspect.signature(wrap_task(Locked)).parameters) == ["factor"]


async def test_locks_held_outside_a_worker_are_renewed_and_their_loss_is_detected(redis: Redis) -> None:
    lock = MutexLock(JOB, "renewed", ttl_ms=1500)
    async with holding([lock], redis):
        await until_renewed(redis, lock.redis_key, 1500)  # a third of its time to live passes before each

    async def lose() -> None:
        async with holding([lock], redis):
            await redis.delete(lock.redis_key)
            await asyncio.Event().wait()

    with pytest.raises(LockLostError, match="lock:mutex:job:renewed"):
        await lose()


async def test_a_block_that_blocked_the_event_loop_longer_than_its_lock_raises(
    redis: Redis,
) -> None:
    """The block ignores cancellations, so its end reports that another worker may have had the lock."""

    async def block() -> None:
        async with holding([MutexLock(JOB, "blocked", ttl_ms=200)], redis):
            time.sleep(0.2)

    with pytest.raises(LockLostError, match="lock:mutex:job:blocked"):
        await block()


def test_installed_tasks_are_found_under_category_and_class_name() -> None:
    registry = load_task_registry()
    assert "jobs:CleanSandboxStoreTask" in registry
    assert "my_pilots:MyPilotTask" in registry
    assert registry.names[registry["my_pilots:MyPilotTask"]] == "my_pilots:MyPilotTask"
    assert set(load_task_registry(["diracx.tasks.jobs"])) == {
        "jobs:CleanSandboxStoreTask",
        "jobs:DummyJobExecutorMonitorTask",
        "jobs:DummyJobExecutorTask",
    }
    validate_registry()


def test_P53_every_public_name_exists_and_imports_only_its_dependencies() -> None:
    promised = [
        "AvailableSecurityProperties",
        "BaseLimiter",
        "BaseLock",
        "BaseTask",
        "CallbackSpawner",
        "ConcurrencyLimiter",
        "Config",
        "CronSchedule",
        "ExclusiveRWLock",
        "ExponentialBackoff",
        "IntervalSeconds",
        "LockedObjectType",
        "MutexLock",
        "NoRetry",
        "NoTransaction",
        "PeriodicBaseTask",
        "PeriodicTaskConfig",
        "PeriodicVoAwareBaseTask",
        "Priority",
        "RRuleSchedule",
        "RateLimiter",
        "ResultIsMissingError",
        "RetryPolicyBase",
        "SendTaskError",
        "SharedRWLock",
        "Size",
        "StopRetryingError",
        "TaskOverride",
        "TaskRetryRequestedError",
        "TaskScheduleBase",
        "TasksConfig",
        "TooManyRetriesError",
        "UnableToAcquireLockError",
        "UnretryableError",
        "auto_inject",
        "auto_inject_depends",
        "find_missing_overrides",
        "fire_callback",
        "load_task_registry",
        "register_locked_object_type",
        "setup_dependency_overrides",
        "spawn_with_callback",
        "task_wrapper",
        "validate_registry",
        "wrap_task",
    ]  # as the contract lists them
    assert set(promised) <= set(plumbing.__all__)
    for name in plumbing.__all__:
        assert getattr(plumbing, name) is not None


async def test_P53_importing_plumbing_loads_no_database_and_no_web_framework() -> None:
    code = (
        "import sys; from diracx.tasks.plumbing import BaseTask, MutexLock, CronSchedule, ExponentialBackoff\n"
        "heavy = {'fastapi', 'sqlalchemy', 'diracx.core.config', 'diracx.db'}\n"
        "print(heavy & set(sys.modules))"
    )

    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert output == b"set()\n"
