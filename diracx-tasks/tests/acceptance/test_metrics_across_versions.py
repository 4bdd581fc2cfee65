"""The metrics of the published package 0.7.0 and of ours, exported of the same tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from support.exported_metrics import SDK, exported
from support.published_package import CREATE
from support.warm_commands import WarmCommands

from benchmarks.compat.scenarios import world
from benchmarks.compat.submit import expected
from benchmarks.peers.environments import ROOT

pytestmark = pytest.mark.timeout(400)

Points = dict[frozenset[tuple[str, Any]], float]
STREAM = "diracx:tasks:normal:medium"


def measured(version: str, directory: Path, commands: WarmCommands) -> dict[str, Points]:
    """Name of each metric -> value by attributes, but for those that are 0; of histograms, how many."""
    with world(directory / version) as new, Redis.from_url(new.url) as redis:
        (new.directory / "sdk").mkdir()
        (new.directory / "sdk" / "sitecustomize.py").write_text(SDK)
        new.database = f"sqlite+aiosqlite:///{new.directory}/tasks.db"
        new.popen = new.published_popen = commands.popen

        def run(code: str) -> None:
            path = (new.directory,) if version == "0.7" else ()
            done = commands.run(["python", "-c", code], env=new.environment(*path), timeout=60)
            assert done.returncode == 0, done.stderr

        run(CREATE)
        paths = [new.directory / "sdk", ROOT, *([new.directory] if version == "0.7" else [])]
        exporting = {
            "EXPORTED": str(new.directory / "exported"),
            "OTEL_METRIC_EXPORT_INTERVAL": "400",
            "OTEL_SDK_DISABLED": "false",
            "PYTHONPATH": ":".join(map(str, paths)),
        }
        new.variables = exporting
        processes = new.both(version)
        new.variables = {}  # metrics of submitters are not compared
        new.until(lambda: redis.exists(STREAM) and redis.xinfo_groups(STREAM) != [], "the worker has started")
        redis.xadd(STREAM, {"data": b"no message"})
        run(_SUBMIT)
        new.wanted |= expected(0, "all")
        new.until(lambda: new.done() and new.left() == 0, "all has ended")
        new.end(processes, kill=False)
        run(_SUBMIT_MORE)
        new.variables = exporting
        scheduler = new.start(version, "scheduler")

        def measures() -> bool:
            metrics = exported(new.directory, scheduler.pid)
            return (
                any(each["value"] for each in metrics.get("task_stream_lag", []))
                and "dead_letter_queue_tasks" in metrics
            )

        new.until(measures, "the scheduler has measured the queues")
        assert new.tally.problems == []
        found: dict[str, Points] = {}
        for process in (*processes, scheduler):
            for name, points in exported(new.directory, process.pid).items():
                mine = found.setdefault(name, {})
                for point in points:
                    which = frozenset(point["attributes"].items())
                    mine[which] = mine.get(which, 0) + point["count" if "count" in point else "value"]
        return {name: {which: value for which, value in each.items() if value} for name, each in found.items()}


_SUBMIT = """
import asyncio, os
from datetime import UTC, datetime, timedelta
from benchmarks.compat.numbered import Doomed, Held, Plain
from benchmarks.compat.submit import bound, submit as submit_set
async def submit(*tasks, **options):
    async with bound(os.environ["DIRACX_TASKS_REDIS_URL"]):
        for task in tasks:
            await task.schedule(**options)
asyncio.run(submit_set(os.environ["DIRACX_TASKS_REDIS_URL"], 0, "all"))
asyncio.run(submit(Doomed(7), Doomed(8), Held(0), Held(4)))
"""
_SUBMIT_MORE = (
    _SUBMIT.partition("\nasyncio")[0]
    + """
asyncio.run(submit(Plain(1), Plain(2), Plain(3)))
asyncio.run(submit(Plain(4), at_time=datetime.now(UTC) + timedelta(hours=1)))
"""
)


def test_values_are_those_of_the_published_package(
    tmp_path: Path, warm_commands: WarmCommands, published_commands: WarmCommands
) -> None:
    theirs = measured("0.7", tmp_path, published_commands)
    ours = measured("ours", tmp_path, warm_commands)

    # What docs/reference/metrics.md says of differences.
    del theirs["task_stream_length"]
    queue = {"priority": "normal", "size": "medium"}
    held, callback = (
        frozenset((queue | {"task_name": f"numbered:{each}"}).items()) for each in ("Held", "Callback")
    )
    assert (theirs["task_queue_wait_seconds"].pop(held), ours["task_queue_wait_seconds"].pop(held)) == (3, 2)
    assert theirs.pop("tasks_submitted_total") == {callback | {("delayed", False)}: 2}
    assert theirs["delayed_tasks_promoted_total"].pop(frozenset()) == 31
    assert ours["delayed_tasks_promoted_total"].pop(frozenset()) == 30

    assert ours["dead_letter_queue_tasks"].pop(frozenset({("task_name", ""), ("status", "PENDING")})) == 1
    assert theirs.keys() >= {"tasks_completed_total", "task_stream_lag", "dead_letter_queue_tasks"}
    assert {name: ours.get(name) for name in theirs} == theirs
