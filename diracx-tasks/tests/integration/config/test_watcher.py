"""Configuration changes take effect in a running system; invalid ones are reported only."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    ExponentialBackoff,
    IntervalSeconds,
    PeriodicVoAwareBaseTask,
    task_broker,
)
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.config import TasksConfig, unknown_names
from diracx.tasks.plumbing.config import watcher as watcher_module
from diracx.tasks.plumbing.config.active import COUNTS_SECONDS, active_configs
from diracx.tasks.plumbing.config.reader import ConfigReader
from diracx.tasks.plumbing.config.watcher import CachedConfig, ConfigWatcher
from diracx.tasks.plumbing.exceptions import TaskConfigError
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.config_repository import ConfigRepository
from support.waiting import until


@dataclass
class Seen:
    """Record of the notifications of a watcher."""

    changes: list[tuple[TasksConfig, Any]] = field(default_factory=list)

    def __call__(self, tasks: TasksConfig, vos: Any) -> None:
        self.changes.append((tasks, vos))


def follower(reader: ConfigReader, seen: Any, **kwargs: Any) -> ConfigWatcher:
    reading = reader.read()
    assert reading.tasks is not None
    return ConfigWatcher(reader, reading.tasks, reading.vos, seen, **kwargs)


# --- the follower -------------------------------------------------------------------------------------------


async def test_a_change_is_reported_once_and_an_invalid_one_never(
    tmp_path: Path, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text("common: {A: {concurrency_limit: 1}}")
    seen = Seen()
    caplog.set_level(logging.INFO)
    async with follower(ConfigReader(path), seen, role="scheduler", redis=redis, process="me", poll_seconds=0.05):
        (entry,) = await active_configs(redis)
        assert (entry.process, entry.role, entry.source, entry.problems) == (
            "me",
            "scheduler",
            str(path),
            (),
        )
        path.write_text("common: {A: {concurrency_limit: 2}}")
        await until(lambda: seen.changes, "the change is reported")
        path.write_text("common: {A: {concurrency_limit: -2}}")

        async def complains() -> bool:
            return bool((await active_configs(redis))[0].problems)

        await until(complains, "the problem is published")
        (bad,) = await active_configs(redis)
        assert bad.problems_since is not None
        assert "concurrency_limit" in bad.problems[0]
        path.write_text("common: {A: {concurrency_limit: 2}}")

        async def content() -> bool:
            return not (await active_configs(redis))[0].problems

        await until(content, "it is valid again")
    assert [tasks.common["A"].concurrency_limit for tasks, _ in seen.changes] == [2]
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert bad.digest in errors[0]
    assert sum("valid again" in record.getMessage() for record in caplog.records) == 1
    assert await active_configs(redis) == [], "a process that ends signs off"


async def test_VOs_are_updated_while_the_settings_are_invalid(tmp_path: Path) -> None:
    repository = ConfigRepository(tmp_path / "config", ["lhcb"])
    seen = Seen()
    follows = follower(ConfigReader(backend_url=repository.url), seen)
    repository.commit(["cms", "lhcb"], {"common": {"A": {"priority": "sometimes"}}})
    await follows.poll()
    assert [vos for _, vos in seen.changes] == [("cms", "lhcb")]
    repository.commit([])
    await follows.poll()
    assert [vos for _, vos in seen.changes][1:] == [()]


async def test_a_configuration_that_a_start_would_refuse_does_not_come_into_force(
    tmp_path: Path, redis: Redis
) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text("")
    seen = Seen()
    registry = {"test:Child": Child}

    def warn(tasks: TasksConfig, vos: Any) -> list[str]:
        return unknown_names(tasks, registry, vos)

    reader = ConfigReader(path, registry=registry)
    async with follower(reader, seen, redis=redis, process="me", warn=warn, poll_seconds=0.05) as follows:
        path.write_text("common: {Child: {enabled: false, max_retries: -1}, Chidl: {max_retries: 1}}")

        async def complains() -> bool:
            return len((await active_configs(redis))[0].problems) == 3

        await until(complains, "everything that is wrong is said at once")
        assert not seen.changes
        path.write_text("common: {Child: {max_retries: 1}, Chidl: {max_retries: 1}}")

        async def warns() -> bool:
            (entry,) = await active_configs(redis)
            return not entry.problems and len(entry.warnings) == 1

        await until(warns, "a name that nothing goes by is a warning")
        assert follows.tasks.get_override("test:Child").max_retries == 1


async def test_a_change_that_cannot_be_applied_is_reported_and_retried(tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text("")
    reported = 0

    def refuse_once(tasks: TasksConfig, vos: Any) -> None:
        nonlocal reported
        reported += 1
        if reported == 1:
            raise RuntimeError("not now")

    follows = follower(ConfigReader(path), refuse_once)
    path.write_text("common: {A: {concurrency_limit: 2}}")
    await follows.poll()
    assert not follows.tasks.common
    await follows.poll()
    assert follows.tasks.common
    assert reported == 2


async def test_a_read_that_hangs_is_reported_and_blocks_nothing(
    tmp_path: Path, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text("")
    reader = ConfigReader(path)
    release = threading.Event()
    original = reader.read
    seen = Seen()
    async with follower(reader, seen, redis=redis, process="me", poll_seconds=0.05, reading_seconds=0.05):
        monkeypatch.setattr(reader, "read", lambda: (release.wait(), original())[1])
        path.write_text("common: {A: {concurrency_limit: 2}}")

        async def complains() -> bool:
            return any("takes longer" in line for line in (await active_configs(redis))[0].problems)

        await until(complains, "the hanging read is published")
        release.set()
        await until(lambda: seen.changes, "the change comes into force when the read has ended")

        async def content() -> bool:
            return not (await active_configs(redis))[0].problems

        await until(content, "and nothing is wrong any more")


async def test_dead_processes_are_removed_from_the_list(redis: Redis, tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text("")
    seconds, _ = await redis.execute_command("TIME")
    long_ago = int(seconds * 1000 - COUNTS_SECONDS * 1000 - 1000)
    await redis.hset(keys.CONFIG_IN_FORCE, "dead", f"{long_ago} {{}}")
    assert await active_configs(redis) == []
    async with follower(ConfigReader(path), Seen(), redis=redis, process="me"):
        assert await redis.hkeys(keys.CONFIG_IN_FORCE) == [b"me"]
        assert 0 < await redis.pttl(keys.CONFIG_IN_FORCE) <= 2 * COUNTS_SECONDS * 1000


async def test_an_idle_follower_writes_little(redis: Redis, tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text("")
    async with follower(ConfigReader(path), Seen(), redis=redis, process="me", poll_seconds=0.01) as follows:
        before = (await redis.info("commandstats")).get("cmdstat_hset", {}).get("calls", 0)
        looks = 0
        original = follows.poll

        async def counted() -> None:
            nonlocal looks
            looks += 1
            await original()

        follows.poll = counted  # type: ignore[method-assign]
        await until(lambda: looks >= 20, "it looks on")
        assert (await redis.info("commandstats"))["cmdstat_hset"]["calls"] == before


# --- worker and scheduler -----------------------------------------------------------------------------------


@dataclass
class Crowd(BaseTask):
    """Counts how many of it run at a time."""

    number: int
    running: ClassVar[int] = 0
    most: ClassVar[int] = 0
    open: ClassVar[asyncio.Event]

    async def execute(self) -> None:
        cls = type(self)
        cls.running += 1
        cls.most = max(cls.most, cls.running)
        try:
            await cls.open.wait()
        finally:
            cls.running -= 1


def limited(task: str, **settings: Any) -> dict[str, Any]:
    return {"common": {f"test:{task}": settings}}


async def test_P46_a_limit_is_raised_and_lowered_in_a_running_system(redis_url: str) -> None:
    Crowd.running = Crowd.most = 0
    Crowd.open = asyncio.Event()
    settings = {"lock_retry_seconds": 0.2}
    async with TaskSystem(
        [Crowd], redis_url=redis_url, workers=1, settings=settings, config=limited("Crowd", concurrency_limit=1)
    ) as system:
        for number in range(6):
            await Crowd(number).schedule()
        await until(lambda: Crowd.running == 1, "one runs")
        system.reconfigure(limited("Crowd", concurrency_limit=3))
        await until(lambda: Crowd.running == 3, "three run")
        system.reconfigure(limited("Crowd", concurrency_limit=2))
        opened, Crowd.open = Crowd.open, asyncio.Event()
        Crowd.most = 0
        opened.set()
        await until(lambda: Crowd.running == 2, "two of the rest run")
        Crowd.open.set()
        await system.drain()
        assert Crowd.most == 2


class Stubborn(BaseTask):
    begun: ClassVar[asyncio.Event]
    release: ClassVar[asyncio.Event]

    async def execute(self) -> str:
        self.begun.set()
        await self.release.wait()
        return "done"


async def test_a_running_task_keeps_the_time_limit_it_began_with(redis_url: str) -> None:
    Stubborn.begun, Stubborn.release = asyncio.Event(), asyncio.Event()
    async with TaskSystem([Stubborn], redis_url=redis_url) as system:
        first = await Stubborn().schedule()
        await Stubborn.begun.wait()
        system.reconfigure(limited("Stubborn", time_limit_seconds=0.05))
        second = await system.result(await Stubborn().schedule())
        assert (second.error or {})["type"] == "TimeLimitExceededError"
        Stubborn.release.set()
        assert (await system.result(first)).return_value == "done"


class Fails(BaseTask):
    retry_policy = ExponentialBackoff(base_delay_seconds=600, max_retries=3)

    async def execute(self) -> None:
        raise ValueError("no")


async def test_the_number_of_retries_follows_the_configuration(redis_url: str) -> None:
    async with TaskSystem([Fails], redis_url=redis_url) as system:
        system.reconfigure(limited("Fails", max_retries=1, retry_base_delay_seconds=0.01))
        assert (await system.result(await Fails().schedule())).is_err


class Child(BaseTask):
    async def execute(self) -> None: ...


class Parent(BaseTask):
    async def execute(self) -> str:
        return await Child().schedule(at_time=datetime.now(UTC) + timedelta(hours=1))


async def stream_of(redis: Redis, task_id: str) -> str:
    header: bytes = await redis.hget(keys.DELAYED_DATA, task_id)
    await redis.delete(keys.DELAYED, keys.DELAYED_DATA)
    return header.split(b" ")[0].decode()


async def test_tasks_submitted_by_tasks_use_the_new_settings(redis_url: str, redis: Redis) -> None:
    async with TaskSystem([Parent, Child], redis_url=redis_url) as system:
        child = (await system.result(await Parent().schedule())).return_value
        assert await stream_of(redis, child) == "diracx:tasks:normal:medium"
        system.reconfigure(limited("Child", priority="realtime"))
        child = (await system.result(await Parent().schedule())).return_value
        assert await stream_of(redis, child) == "diracx:tasks:realtime:medium"


class Visit(PeriodicVoAwareBaseTask):
    default_schedule = IntervalSeconds(0.1)
    visited: ClassVar[list[str]] = []

    async def execute(self) -> None:
        self.visited.append(self.vo)


async def test_P43_VOs_are_added_and_removed_in_a_running_system(redis_url: str, redis: Redis) -> None:
    async with TaskSystem([Visit], redis_url=redis_url, vos=["lhcb"]) as system:
        await until(lambda: "lhcb" in Visit.visited, "the first VO is served")
        system.reconfigure(None, vos=["cms"])
        await until(lambda: "cms" in Visit.visited, "the new VO is served")

        async def only_cms() -> bool:
            return await redis.zrange(keys.NEXT_RUNS, 0, -1) == [b"test:Visit/cms"]

        await until(only_cms, "the old one is not scheduled any more")
        system.reconfigure(limited("Visit", enabled=False))

        async def none() -> bool:
            return not await redis.zrange(keys.NEXT_RUNS, 0, -1)

        await until(none, "a task that is switched off is not scheduled any more")
        await system.drain()


async def test_a_configuration_that_is_wrong_leaves_a_test_system_as_it_was(redis_url: str) -> None:
    async with TaskSystem([Child], redis_url=redis_url, config=limited("Child", max_retries=2)) as system:
        with pytest.raises(ValueError, match="max_retries"):
            system.reconfigure(limited("Child", max_retries=-1))
        assert system.config.common["test:Child"].max_retries == 2


# --- submitters ----------------------------------------------------------------------------------------


@pytest.fixture
def checked_at_every_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    """Submitters check the configuration at every submission."""
    monkeypatch.setattr(watcher_module, "POLL_SECONDS", 0.0)


async def test_P46_a_submitting_process_follows_the_priority(
    redis_url: str,
    redis: Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checked_at_every_submission: None,
) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text("common: {Child: {priority: background}}")
    monkeypatch.setenv("DIRACX_TASKS_CONFIG", str(path))
    later = datetime.now(UTC) + timedelta(hours=1)
    async with task_broker(redis_url, {"test:Child": Child}):
        assert await stream_of(redis, await Child().schedule(later)) == "diracx:tasks:background:medium"
        path.write_text("common: {Child: {priority: realtime}}")
        assert await stream_of(redis, await Child().schedule(later)) == "diracx:tasks:realtime:medium"
        path.write_text("common: {Child: {priority: sometimes}}")
        assert await stream_of(redis, await Child().schedule(later)) == "diracx:tasks:realtime:medium"


async def test_a_submission_does_not_wait_for_a_read_that_hangs(
    redis_url: str,
    redis: Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checked_at_every_submission: None,
) -> None:
    monkeypatch.setattr(watcher_module, "SUBMITTER_SECONDS", 0.05)
    path = tmp_path / "tasks.yaml"
    path.write_text("common: {Child: {priority: background}}")
    monkeypatch.setenv("DIRACX_TASKS_CONFIG", str(path))
    later = datetime.now(UTC) + timedelta(hours=1)
    release = threading.Event()
    async with task_broker(redis_url, {"test:Child": Child}):
        original = ConfigReader.read_tasks
        monkeypatch.setattr(ConfigReader, "read_tasks", lambda self: (release.wait(), original(self))[1])
        assert await stream_of(redis, await Child().schedule(later)) == "diracx:tasks:background:medium"
        assert await stream_of(redis, await Child().schedule(later)) == "diracx:tasks:background:medium"
        release.set()


async def test_submissions_fail_together_while_the_first_read_hangs_and_work_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher_module, "READING_SECONDS", 0.05)
    path = tmp_path / "tasks.yaml"
    path.write_text("common: {Child: {priority: background}}")
    release, reads, original = threading.Event(), [], ConfigReader.read_tasks

    def hang(self: ConfigReader) -> TasksConfig:
        reads.append(self)
        release.wait()
        return original(self)

    monkeypatch.setattr(ConfigReader, "read_tasks", hang)
    config = CachedConfig(ConfigReader(path))
    for _ in range(2):
        outcomes = await asyncio.gather(*(config.tasks() for _ in range(5)), return_exceptions=True)
        assert all("takes longer" in str(each) and isinstance(each, TaskConfigError) for each in outcomes)
    assert len(reads) == 1, "one thread hangs, not one for each submission"
    release.set()

    async def works() -> bool:
        with contextlib.suppress(TaskConfigError):
            return "Child" in (await config.tasks()).common
        return False

    await until(works, "the submitter has the settings when the read has ended")
    path.write_text("common: {Child: {priority: sometimes}}")
    for _ in range(2):
        with pytest.raises(TaskConfigError, match="priority"):
            await CachedConfig(ConfigReader(path)).tasks()


async def test_a_first_read_that_fails_after_all_submissions_have_left_fails_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text("common: {Child: {priority: sometimes}}")
    release, original = threading.Event(), ConfigReader.read_tasks

    def hang(self: ConfigReader) -> TasksConfig:
        release.wait()
        return original(self)

    monkeypatch.setattr(ConfigReader, "read_tasks", hang)
    config = CachedConfig(ConfigReader(path))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(config.tasks(), 0.05)
    release.set()
    for thread in threading.enumerate():
        if thread.name == "diracx-configuration":
            thread.join()
    for _ in range(2):  # the event loop gets the outcome, then calls what waits for it
        await asyncio.sleep(0)
    path.write_text("common: {Child: {priority: background}}")
    assert "Child" in (await config.tasks()).common


async def test_a_submitter_reads_the_configuration_at_most_once_in_five_seconds(
    redis_url: str, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text("common: {Child: {priority: background}}")
    monkeypatch.setenv("DIRACX_TASKS_CONFIG", str(path))
    later = datetime.now(UTC) + timedelta(hours=1)
    looks = 0

    def count(self: ConfigReader) -> Any:
        nonlocal looks
        looks += 1

    async with task_broker(redis_url, {"test:Child": Child}):
        monkeypatch.setattr(ConfigReader, "read_tasks", count)
        for _ in range(20):
            await stream_of(redis, await Child().schedule(later))
        assert looks == 0
