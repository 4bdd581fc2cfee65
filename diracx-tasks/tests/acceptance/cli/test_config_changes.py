"""Changes of the configuration of running workers and schedulers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.broker.models import submit_task
from diracx.tasks.plumbing.config.active import ActiveConfig, active_configs
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from support.config_repository import ConfigRepository

#: What is promised.
FOLLOWED_SECONDS = 10.0

TASKS = """
import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

from diracx.tasks.plumbing import BaseTask, IntervalSeconds, PeriodicVoAwareBaseTask


@dataclass
class Gated(BaseTask):
    number: int

    async def execute(self):
        started = Path(f"started-{self.number}")
        started.touch()
        while not Path("open").exists():
            await asyncio.sleep(0.02)
        started.unlink()


class Visit(PeriodicVoAwareBaseTask):
    default_schedule = IntervalSeconds(3600)

    async def execute(self): ...


class Child(BaseTask):
    async def execute(self): ...


if "OTEL_TEST_METRICS" in os.environ:  # as an installation sets it up in a module of its own
    from opentelemetry import metrics
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader

    out = open(os.environ["OTEL_TEST_METRICS"], "a")
    exporter = ConsoleMetricExporter(out=out, formatter=lambda data: data.to_json(indent=None) + "\\n")
    metrics.set_meter_provider(MeterProvider([PeriodicExportingMetricReader(exporter, 200)]))
"""


@pytest.fixture
def live(served, tmp_path):
    """The command line with those tasks."""
    (tmp_path / "live_tasks.py").write_text(TASKS)
    served.environment["DIRACX_TASKS_CONFIG"] = str(tmp_path / "tasks.yaml")
    return served


def start(live, command: str, *args: str):
    process = live.start(command, *args, "--module", "live_tasks.py")
    process.until("ready")
    return process


def said(live) -> list[ActiveConfig]:
    """Read the configurations that processes report, without starting a command."""

    async def ask() -> list[ActiveConfig]:
        redis = AsyncRedis.from_url(live.environment["DIRACX_TASKS_REDIS_URL"])
        try:
            return await active_configs(redis)
        finally:
            await redis.aclose()

    return asyncio.run(ask())


def in_force(live) -> list[dict[str, Any]]:
    """Run the command and return its rows."""
    found = live("config", "in-force", "--json")
    entries: list[dict[str, Any]] = json.loads(found.stdout)
    assert found.returncode == (1 if any(entry["problems"] for entry in entries) else 0)
    return entries


def limit(tmp_path, number: int) -> None:
    """Replace the file as a deployment does, in one step."""
    (tmp_path / "new.yaml").write_text(f"common: {{Gated: {{concurrency_limit: {number}}}}}")
    (tmp_path / "new.yaml").replace(tmp_path / "tasks.yaml")


def running(tmp_path) -> int:
    return len(list(tmp_path.glob("started-*")))


def test_P46_a_limit_in_the_file_takes_effect_without_a_restart(live, tmp_path, wait_until):
    limit(tmp_path, 1)
    start(live, "worker")

    def submit(numbers: range) -> None:
        asyncio.run(submit_gated(live.environment["DIRACX_TASKS_REDIS_URL"], numbers))

    def changed_to(number: int) -> None:
        (before,) = said(live)
        limit(tmp_path, number)
        wait_until(lambda: said(live)[0].digest != before.digest, "it is in force", FOLLOWED_SECONDS)

    submit(range(2))
    wait_until(lambda: running(tmp_path) == 1, "one runs")
    changed_to(3)
    submit(range(2, 4))
    wait_until(lambda: running(tmp_path) == 3, "the next ones run")
    changed_to(1)
    with Redis.from_url(live.environment["DIRACX_TASKS_REDIS_URL"]) as redis:

        def left() -> int:
            queued = [redis.xlen(f"diracx:tasks:normal:medium{suffix}") for suffix in ("", ":handover")]
            return sum(queued) + redis.hlen("diracx:tasks:delayed:data")

        (tmp_path / "open").touch()
        wait_until(lambda: not left(), "all have ended")
        (tmp_path / "open").unlink()
        submit(range(4, 7))
        wait_until(lambda: running(tmp_path) == 1, "one runs again")
        wait_until(lambda: redis.hlen("diracx:tasks:delayed:data") == 2, "the others wait for it")
        assert running(tmp_path) == 1
        (tmp_path / "open").touch()
        wait_until(lambda: not left(), "all have ended")


async def submit_gated(url: str, numbers: range) -> None:
    broker = RedisStreamBroker(url)
    try:
        for number in numbers:
            await submit_task(broker, "live_tasks:Gated", [number])
    finally:
        await broker.shutdown()


def test_P46_a_wrong_file_does_not_take_effect_and_is_reported_everywhere(live, tmp_path, wait_until):
    limit(tmp_path, 1)
    live.environment["OTEL_TEST_METRICS"] = str(tmp_path / "metrics.json")
    worker = start(live, "worker")
    del live.environment["OTEL_TEST_METRICS"]
    scheduler = start(live, "scheduler")
    good = {entry["role"]: entry["digest"] for entry in in_force(live)}
    assert good.keys() == {"scheduler", "worker medium"}
    assert len(set(good.values())) == 1
    (tmp_path / "tasks.yaml").write_text("common: {Gated: {concurrency_limit: many}}")
    for process in (worker, scheduler):
        process.until("common.Gated.concurrency_limit")
        (line,) = [line for line in process.output.splitlines() if "concurrency_limit" in line]
        assert "ERROR" in line
        assert next(iter(good.values())) in line
    wait_until(lambda: all(entry.problems for entry in said(live)), "both say so")
    assert {entry["role"]: entry["digest"] for entry in in_force(live)} == good
    shown = live("config", "in-force")
    assert shown.returncode == 1
    assert "last valid one" in shown.stdout
    assert "common.Gated.concurrency_limit" in shown.stdout
    assert "2 processes" in shown.stdout
    metrics = tmp_path / "metrics.json"
    wait_until(lambda: latest(metrics, "diracx.tasks.config.reload_failures") == 1, "the failure is counted")
    assert latest(metrics, "diracx.tasks.config.current") == 0
    limit(tmp_path, 2)
    for process in (worker, scheduler):
        process.until("valid again")
    wait_until(lambda: latest(metrics, "diracx.tasks.config.current") == 1, "the gauge is back")
    (tmp_path / "tasks.yaml").unlink()
    worker.until("No such file")
    worker.process.terminate()
    scheduler.process.terminate()
    assert worker.ends() == scheduler.ends() == 0
    assert in_force(live) == []


def latest(metrics, name: str) -> int | None:
    """The last value of a metric that was exported."""
    found = None
    for line in metrics.read_text().splitlines():
        try:
            data = json.loads(line)
        except ValueError:
            continue  # being written
        for resource in data["resource_metrics"]:
            for scope in resource["scope_metrics"]:
                for metric in scope["metrics"]:
                    if metric["name"] == name:
                        found = metric["data"]["data_points"][-1]["value"]
    return found


def test_P43_an_added_or_removed_VO_takes_effect_within_10_seconds(live, tmp_path, redis_url, wait_until):
    del live.environment["DIRACX_TASKS_CONFIG"]
    repository = ConfigRepository(tmp_path / "config", ["lhcb"])
    live.environment["DIRACX_CONFIG_BACKEND_URL"] = repository.url
    scheduler = start(live, "scheduler")
    with Redis.from_url(redis_url, decode_responses=True) as redis:

        def schedules() -> set[str]:
            names = redis.zrange("diracx:scheduler:next", 0, -1)
            return {name for name in names if name.startswith("live_tasks:Visit")}

        wait_until(lambda: schedules() == {"live_tasks:Visit/lhcb"}, "the first VO")
        repository.commit(["lhcb", "cms"])
        both = {"live_tasks:Visit/lhcb", "live_tasks:Visit/cms"}
        wait_until(lambda: schedules() == both, "the new VO", FOLLOWED_SECONDS)
        repository.commit(["cms"])
        wait_until(lambda: schedules() == {"live_tasks:Visit/cms"}, "the VO that went", FOLLOWED_SECONDS)
        repository.commit(["cms"], {"common": {"Visit": {"enabled": False}}})
        wait_until(lambda: not schedules(), "the task that was switched off", FOLLOWED_SECONDS)
        (entry,) = in_force(live)
        assert (entry["source"], entry["vos"]) == ("Systems.Tasks", ["cms"])
        repository.commit_text("Registry: nothing")
        scheduler.until("the DiracX configuration cannot be read")
        assert scheduler.output.count("the DiracX configuration cannot be read") >= 1


@pytest.mark.leaves_keys("diracx:tasks:*")
def test_a_process_that_was_killed_is_shown_no_longer_than_a_minute(live, tmp_path, redis_url):
    limit(tmp_path, 1)
    worker = start(live, "worker")
    worker.process.kill()
    worker.process.wait()
    (entry,) = in_force(live)
    with Redis.from_url(redis_url, decode_responses=True) as redis:
        seen, _, message = redis.hget("diracx:tasks:config-in-force", entry["process"]).partition(" ")
        redis.hset("diracx:tasks:config-in-force", entry["process"], f"{int(seen) - 61_000} {message}")
    assert in_force(live) == []
    shown = live("config", "in-force")
    assert shown.returncode == 0
    assert "no worker or scheduler runs" in shown.stderr
