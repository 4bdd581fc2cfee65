"""The metrics of the published package 0.7.0 and of ours, exported of the same tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from benchmarks.compat.scenarios import world
from benchmarks.peers.environments import ROOT, is_ready

from .test_migration import CREATE
from .test_telemetry import SDK, exported

pytestmark = pytest.mark.timeout(400)

Points = dict[frozenset[tuple[str, Any]], float]
STREAM = "diracx:tasks:normal:medium"


def measured(version: str, directory: Path) -> dict[str, Points]:
    """Name of each metric -> value by attributes, but for those that are 0; of histograms, how many."""
    with world(directory / version) as new, Redis.from_url(new.url) as redis:
        (new.directory / "sdk").mkdir()
        (new.directory / "sdk" / "sitecustomize.py").write_text(SDK)
        new.database = f"sqlite+aiosqlite:///{new.directory}/tasks.db"
        new.run(version, *((CREATE,) if version == "0.7" else ("-m", "diracx.tasks", "dlq", "init")))
        paths = [new.directory / "sdk", ROOT, *([new.directory] if version == "0.7" else [])]
        new.variables = {
            "EXPORTED": str(new.directory / "exported"),
            "OTEL_METRIC_EXPORT_INTERVAL": "400",
            "OTEL_SDK_DISABLED": "false",
            "PYTHONPATH": ":".join(map(str, paths)),
        }
        processes = new.both(version)
        new.until(lambda: redis.exists(STREAM) and redis.xinfo_groups(STREAM) != [], "the worker has started")
        redis.xadd(STREAM, {"data": b"no message"})
        new.submit(version, 0)
        new.run(version, _SUBMIT)
        new.until(lambda: new.done() and new.left() == 0, "all has ended")
        new.end(processes, kill=False)
        new.run(version, _SUBMIT_MORE)
        scheduler = new.start(version, "scheduler")

        def measures() -> bool:
            told = exported(new.directory, scheduler.pid)
            return (
                any(each["value"] for each in told.get("task_stream_lag", []))
                and "dead_letter_queue_tasks" in told
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
from benchmarks.compat.submit import bound
async def submit(*tasks, **options):
    async with bound(os.environ["DIRACX_TASKS_REDIS_URL"]):
        for task in tasks:
            await task.schedule(**options)
asyncio.run(submit(Doomed(7), Doomed(8), Held(0), Held(4)))
"""
_SUBMIT_MORE = (
    _SUBMIT.rpartition("\nasyncio")[0]
    + """
asyncio.run(submit(Plain(1), Plain(2), Plain(3)))
asyncio.run(submit(Plain(4), at_time=datetime.now(UTC) + timedelta(hours=1)))
"""
)


def test_values_are_those_of_the_published_package(tmp_path: Path) -> None:
    if not is_ready("reference"):
        pytest.skip("the published package is not installed (`make servers` does it)")
    theirs, ours = measured("0.7", tmp_path), measured("ours", tmp_path)

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
