"""Configured limits of objects in real workers: by kind, by key, by VO."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from diracx.tasks.plumbing import (
    BaseLock,
    BaseTask,
    ConcurrencyLimiter,
    MutexLock,
    RateLimiter,
    register_locked_object_type,
    schedule_many,
)
from diracx.tasks.plumbing.config import TasksConfig
from diracx.tasks.plumbing.worker.task_spec import TaskSpec
from diracx.tasks.testing import TaskSystem

SITE = register_locked_object_type("test_site")


class Watch:
    """Highest number of concurrent executions by key."""

    def __init__(self) -> None:
        self.most: Counter[Any] = Counter()
        self._inside: Counter[Any] = Counter()
        self.started: list[float] = []

    async def stay(self, *counted_by: Any) -> None:
        self.started.append(time.monotonic())
        for key in counted_by:
            self._inside[key] += 1
            self.most[key] = max(self.most[key], self._inside[key])
        await asyncio.sleep(0.03)
        self._inside.subtract(counted_by)


WATCH = Watch()


@pytest.fixture(autouse=True)
def _watch_anew() -> None:
    WATCH.__init__()  # type: ignore[misc]


@dataclass
class AtSite(BaseTask):
    site: str
    vo: str = "cms"

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [ConcurrencyLimiter(SITE, self.site), RateLimiter(SITE, self.site, "starts")]

    async def execute(self) -> None:
        await WATCH.stay(self.site, (self.site, self.vo))


@dataclass
class AlsoAtSite(AtSite):
    pass


class Plain(BaseTask):
    async def execute(self) -> None:
        await WATCH.stay(type(self))


class OtherPlain(Plain):
    pass


async def run(redis_url: str, tasks: list[BaseTask], **config: Any) -> None:
    classes = list({type(task): None for task in tasks})
    async with TaskSystem(classes, redis_url=redis_url, config=config) as system:
        await schedule_many(tasks)
        await system.drain()
    assert len(WATCH.started) == len(tasks)


async def test_a_limit_of_a_key_overrides_the_default_of_its_kind(redis_url: str) -> None:
    limits = {SITE: {"default": {"concurrency_limit": 1}, "keys": {"big": {"concurrency_limit": 3}}}}
    tasks: list[BaseTask] = [AtSite(site) for site in ("big", "small", "tiny") for _ in range(8)]
    await run(redis_url, tasks, limits=limits)
    assert [WATCH.most[site] for site in ("big", "small", "tiny")] == [3, 1, 1]


async def test_a_limit_of_an_object_holds_for_all_classes_together(redis_url: str) -> None:
    tasks = [kind("here") for kind in (AtSite, AlsoAtSite) for _ in range(6)]
    await run(redis_url, list(tasks), limits={SITE: {"default": {"concurrency_limit": 2}}})
    assert WATCH.most["here"] == 2


async def test_a_limit_of_a_vo_counts_the_tasks_of_that_vo_only(redis_url: str) -> None:
    tasks: list[BaseTask] = [AtSite("here", vo) for _ in range(8) for vo in ("lhcb", "cms", "cta")]
    await run(
        redis_url,
        tasks,
        limits={SITE: {"default": {"concurrency_limit": 2}}},
        vo_limits={"lhcb": {SITE: {"keys": {"here": {"concurrency_limit": 1}}}}},
    )
    assert WATCH.most["here", "lhcb"] == 1
    assert 1 <= WATCH.most["here", "cms"] <= 2
    assert WATCH.most["here"] <= 3, "the others share their two"


async def test_a_rate_by_all_keys_of_a_limiter_is_obeyed(redis_url: str) -> None:
    keys = {
        "here": {"rate_limit": 50, "rate_window_seconds": 60},
        "here:starts": {"rate_limit": 2, "rate_window_seconds": 0.3},
    }
    default = {"rate_limit": 1, "rate_window_seconds": 60}
    await run(redis_url, [AtSite("here") for _ in range(6)], limits={SITE: {"default": default, "keys": keys}})
    started = sorted(WATCH.started)
    assert all(third - first > 0.25 for first, third in zip(started, started[2:], strict=False))


async def test_a_default_for_tasks_limits_each_class_and_its_own_limit_wins(redis_url: str) -> None:
    tasks: list[BaseTask] = [kind() for kind in (Plain, OtherPlain) for _ in range(8)]
    await run(
        redis_url,
        tasks,
        limits={"task": {"default": {"concurrency_limit": 1}}},
        common={"test:OtherPlain": {"concurrency_limit": 3}},
    )
    assert (WATCH.most[Plain], WATCH.most[OtherPlain]) == (1, 3)


def locks_of(task: BaseTask, **config: Any) -> dict[str, Any]:
    """The key of each lock that is taken, with its limit."""
    name = f"test:{type(task).__name__}"
    taken = TaskSpec(name, type(task), TasksConfig.model_validate(config)).locks(task)
    return {lock.redis_key: getattr(lock, "limit", None) for lock in taken}


def test_without_configuration_a_limiter_costs_nothing() -> None:
    requested: list[str] = []

    class Counting(TasksConfig):
        def get_override(self, *args: Any, **kwargs: Any) -> Any:
            requested.append("override")
            return super().get_override(*args, **kwargs)

        def get_limits(self, *args: Any, **kwargs: Any) -> Any:
            requested.append("limits")
            return super().get_limits(*args, **kwargs)

    unrelated = {SITE: {"default": {"concurrency_limit": 1}}}
    assert TaskSpec("test:AtSite", AtSite, Counting()).locks(AtSite("here")) == []
    assert TaskSpec("test:Plain", Plain, Counting.model_validate({"limits": unrelated})).locks(Plain()) == []
    assert requested == []


def test_the_settings_of_a_task_override_those_of_its_object() -> None:
    limits = {"task": {"default": {"concurrency_limit": 4, "rate_limit": 9, "rate_window_seconds": 1}}}
    default = {"limiter:conc:task:Plain": 4, "limiter:rate:task:Plain": 9}
    assert locks_of(Plain(), limits=limits) == default
    assert locks_of(Plain(), limits=limits, common={"Plain": {"concurrency_limit": 7}}) == {
        **default,
        "limiter:conc:task:Plain": 7,
    }
    as_in_code = {"Plain": {"concurrency_limit": None}}
    assert locks_of(Plain(), limits=limits, common=as_in_code) == {"limiter:rate:task:Plain": 9}
    del default["limiter:rate:task:Plain"]
    keys = {"task": {**limits["task"], "keys": {"Plain": {"rate_limit": None}}}}
    assert locks_of(Plain(), limits=keys) == default


def test_only_limits_of_the_vo_itself_are_counted_per_vo() -> None:
    @dataclass
    class OfVo(BaseTask):
        vo: str

    common = {"OfVo": {"concurrency_limit": 7, "rate_limit": 9, "rate_window_seconds": 1}}
    of_vo = {"lhcb": {"OfVo": {"rate_limit": 2}}, "cta": {"OfVo": {"max_retries": 2}}}
    everybody = {"limiter:rate:task:OfVo": 9, "limiter:conc:task:OfVo": 7}
    assert locks_of(OfVo("cms"), common=common, vo_overrides=of_vo) == everybody
    assert locks_of(OfVo("cta"), common=common, vo_overrides=of_vo) == everybody
    assert locks_of(OfVo("lhcb"), common=common, vo_overrides=of_vo) == {
        "limiter:rate:task:OfVo:lhcb": 2,
        "limiter:conc:task:OfVo": 7,
    }


def test_limiters_that_a_class_shares_are_not_written_to() -> None:
    shared = ConcurrencyLimiter(SITE, "here")

    @dataclass
    class Sharing(BaseTask):
        vo: str

        @property
        def execution_locks(self) -> list[BaseLock]:
            return [shared, MutexLock(SITE, "here")]

    limits = {"lhcb": {SITE: {"default": {"concurrency_limit": 1}}}}
    for _ in range(2):
        assert locks_of(Sharing("lhcb"), vo_limits=limits) == {
            "limiter:conc:test_site:here:lhcb": 1,
            "lock:mutex:test_site:here": None,
        }
        assert locks_of(Sharing("cms"), vo_limits=limits) == {"lock:mutex:test_site:here": None}
    assert shared.limit is None
