"""Stateful test of each kind of lock against a model, on a real server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import (
    BaseLock,
    ConcurrencyLimiter,
    ExclusiveRWLock,
    MutexLock,
    RateLimiter,
    SharedRWLock,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from redis.asyncio import Redis

OWNERS = st.integers(0, 3)


class Five(RateLimiter):
    limit = 5
    window_seconds = 600.0


class Two(ConcurrencyLimiter):
    limit = 2


class LockMachine(RuleBasedStateMachine):
    """Runs coroutines of the locks one after another, each owner with an instance of its own."""

    url: str

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.redis = Redis.from_url(self.url)
        self.run(self.redis.flushall())
        self.locks = [self.make() for _ in range(4)]

    def make(self) -> BaseLock:
        raise NotImplementedError

    def run(self, call: Any) -> Any:
        async def awaited() -> Any:
            return await call

        return self.runner.run(awaited())

    def teardown(self) -> None:
        self.run(self.redis.flushall())
        self.run(self.redis.aclose())
        self.runner.close()


class MutexMachine(LockMachine):
    holder: int | None = None

    def make(self) -> BaseLock:
        return MutexLock(JOB, 1, ttl_ms=600_000)

    @rule(owner=OWNERS)
    def acquire(self, owner: int) -> None:
        assert self.run(self.locks[owner].acquire(self.redis)) == (self.holder is None)
        if self.holder is None:
            self.holder = owner

    @rule(owner=OWNERS)
    def release(self, owner: int) -> None:
        self.run(self.locks[owner].release(self.redis))
        if self.holder == owner:
            self.holder = None

    @rule(owner=OWNERS)
    def extend(self, owner: int) -> None:
        assert self.run(self.locks[owner].extend(self.redis)) == (self.holder == owner)

    @rule()
    def expire(self) -> None:
        self.run(self.redis.delete(self.locks[0].redis_key))
        self.holder = None

    @invariant()
    def key_exists_while_it_is_held(self) -> None:
        assert self.run(self.redis.exists(self.locks[0].redis_key)) == (self.holder is not None)


class ReadersWriterMachine(LockMachine):
    def __init__(self) -> None:
        super().__init__()
        self.writers = [ExclusiveRWLock(JOB, 1, ttl_ms=600_000) for _ in range(4)]
        self.writer: int | None = None
        self.readers: set[int] = set()

    def make(self) -> BaseLock:
        return SharedRWLock(JOB, 1)

    @rule(owner=OWNERS)
    def read(self, owner: int) -> None:
        assert self.run(self.locks[owner].acquire(self.redis)) == (self.writer is None)
        if self.writer is None:
            self.readers.add(owner)

    @rule(owner=OWNERS)
    def stop_reading(self, owner: int) -> None:
        self.run(self.locks[owner].release(self.redis))
        self.readers.discard(owner)

    @rule(owner=OWNERS)
    def write(self, owner: int) -> None:
        free = self.writer is None and not self.readers
        assert self.run(self.writers[owner].acquire(self.redis)) == free
        if free:
            self.writer = owner

    @rule(owner=OWNERS)
    def stop_writing(self, owner: int) -> None:
        self.run(self.writers[owner].release(self.redis))
        if self.writer == owner:
            self.writer = None

    @rule(owner=OWNERS)
    def extend(self, owner: int) -> None:
        assert self.run(self.writers[owner].extend(self.redis)) == (self.writer == owner)
        assert not self.run(self.locks[owner].extend(self.redis))

    @invariant()
    def readers_are_counted(self) -> None:
        counted = self.run(self.redis.hget(self.locks[0].redis_key, "readers"))
        assert int(counted or 0) == len(self.readers)
        if not self.readers and self.writer is None:
            assert not self.run(self.redis.exists(self.locks[0].redis_key))


class ConcurrencyMachine(LockMachine):
    def __init__(self) -> None:
        super().__init__()
        self.holders: set[int] = set()

    def make(self) -> BaseLock:
        return Two(JOB, 1, ttl_ms=600_000)

    @rule(owner=OWNERS)
    def acquire(self, owner: int) -> None:
        granted = owner in self.holders or len(self.holders) < 2
        assert self.run(self.locks[owner].acquire(self.redis)) == granted
        if granted:
            self.holders.add(owner)

    @rule(owner=OWNERS)
    def release(self, owner: int) -> None:
        self.run(self.locks[owner].release(self.redis))
        self.holders.discard(owner)

    @rule(owner=OWNERS)
    def extend(self, owner: int) -> None:
        assert self.run(self.locks[owner].extend(self.redis)) == (owner in self.holders)

    @rule(owner=OWNERS)
    def expire(self, owner: int) -> None:
        """Let the lock expire, as after the death of its worker."""
        self.run(self.redis.zadd(self.locks[0].redis_key, {self.locks[owner]._owner_id: 1}, xx=True))
        self.holders.discard(owner)


class RateMachine(LockMachine):
    def __init__(self) -> None:
        super().__init__()
        self.granted: list[int] = []

    def make(self) -> BaseLock:
        return Five(JOB, 1)

    @rule(n_items=st.integers(1, 5))
    def acquire(self, n_items: int) -> None:
        granted = sum(self.granted) + n_items <= 5
        assert self.run(Five(JOB, 1, n_items=n_items).acquire(self.redis)) == granted
        if granted:
            self.granted.append(n_items)

    @rule(owner=OWNERS)
    def release(self, owner: int) -> None:
        self.run(self.locks[owner].release(self.redis))

    @rule()
    def oldest_grant_leaves_the_window(self) -> None:
        if self.granted:
            self.run(self.redis.zpopmin(self.locks[0].redis_key))
            self.granted.pop(0)


@pytest.mark.parametrize("machine", [MutexMachine, ReadersWriterMachine, ConcurrencyMachine, RateMachine])
def test_lock_behaves_as_its_model(machine: type[LockMachine], redis_url: str) -> None:
    machine.url = redis_url
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
