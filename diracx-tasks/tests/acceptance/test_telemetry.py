"""The same metrics by OpenTelemetry and for Prometheus, of real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diracx.tasks.testing.server import free_port
from redis import Redis as RedisClient

from .conftest import MY_TASKS, Cli
from .test_metrics import get, samples

#: What whoever runs a worker may do: set up the SDK. Here it writes to a file.
_SDK = """
import os
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader

out = open(os.environ["EXPORTED"] + str(os.getpid()), "w")
exporter = ConsoleMetricExporter(out=out, formatter=lambda data: data.to_json(indent=None) + chr(10))
metrics.set_meter_provider(MeterProvider(metric_readers=[PeriodicExportingMetricReader(exporter)]))
"""
#: Names that dashboards of the published package ask for.
_PUBLISHED_BY_WORKERS = {
    "tasks_submitted_total",
    "tasks_completed_total",
    "tasks_failed_total",
    "tasks_retried_total",
    "tasks_given_up_total",
    "task_messages_rejected_total",
    "task_messages_reclaimed_total",
    "task_duration_seconds",
    "task_queue_wait_seconds",
    "tasks_in_progress",
    "worker_max_concurrent_tasks",
    "delayed_tasks_promoted_total",
}
_PUBLISHED_BY_SCHEDULERS = {
    "scheduler_leader",
    "scheduler_periodic_submissions_total",
    "delayed_tasks_pending",
    "delayed_tasks_promoted_total",
    "dead_letter_queue_tasks",
    "task_stream_length",
    "task_stream_pending",
    "task_stream_lag",
}


def exported(directory: Path, pid: int) -> dict[str, list[dict[str, Any]]]:
    """Name of each metric -> its data points, of the last export."""
    path = directory / f"exported{pid}"
    lines = path.read_text().splitlines() if path.exists() else []
    complete = [line for line in lines if line.endswith("}")]
    if not complete:
        return {}
    return {
        metric["name"]: metric["data"]["data_points"]
        for resource in json.loads(complete[-1])["resource_metrics"]
        for scope in resource["scope_metrics"]
        if scope["scope"]["name"] == "diracx.tasks"
        for metric in scope["metrics"]
    }


def named(text: str) -> set[str]:
    """Metrics of a page of Prometheus, with values or without."""
    return {line.split(" ")[2] for line in text.splitlines() if line.startswith("# TYPE ")}


def with_sdk(served: Cli) -> Cli:
    (served.directory / "my_tasks.py").write_text(MY_TASKS + _SDK)
    served.environment |= {
        "EXPORTED": str(served.directory / "exported"),
        "OTEL_METRIC_EXPORT_INTERVAL": "400",
    }
    return served


def test_a_worker_tells_opentelemetry_and_prometheus_the_same(
    served: Cli, wait_until: Callable[..., None]
) -> None:
    with_sdk(served)
    port = free_port()
    worker = served.start("worker", "--module", "my_tasks.py", "--metrics-port", str(port))
    worker.until("ready")
    assert worker.process.pid
    served.mine("submit", "my_tasks:Spawn")
    served.mine("submit", "my_tasks:Fail")

    def points(name: str) -> list[dict[str, Any]]:
        return exported(served.directory, worker.process.pid).get(name, [])

    def value(name: str, **attributes: object) -> float:
        return sum(point["value"] for point in points(name) if attributes.items() <= point["attributes"].items())

    greet = {"task_name": "my_tasks:Greet", "priority": "normal", "size": "medium"}
    wait_until(lambda: value("tasks_completed_total", **greet) == 3, "three greetings are exported")
    wait_until(lambda: value("tasks_failed_total", task_name="my_tasks:Fail") == 1, "the failure is exported")
    assert value("tasks_submitted_total", **greet, delayed=False) == 3
    assert value("worker_max_concurrent_tasks", worker_size="medium") == 10
    [run_times] = [each for each in points("task_duration_seconds") if each["attributes"] == greet]
    assert run_times["count"] == 3
    assert run_times["explicit_bounds"][0] < 0.01 < 4000 < run_times["explicit_bounds"][-1]
    text = get(port, "/metrics")[1]
    told = samples(text)
    labels = 'task_name="my_tasks:Greet",priority="normal",size="medium"'
    assert told[f"tasks_completed_total{{{labels}}}"] == 3
    assert told[f'tasks_submitted_total{{{labels},delayed="false"}}'] == 3
    assert named(text) >= _PUBLISHED_BY_WORKERS


@pytest.mark.leaves_keys("diracx:tasks:normal:medium")  # nobody works
def test_the_leading_scheduler_tells_opentelemetry_and_prometheus_the_same(
    served: Cli, wait_until: Callable[..., None]
) -> None:
    with_sdk(served)
    served.environment["DIRACX_DB_URL_TASKDB"] = f"sqlite+aiosqlite:///{served.directory}/tasks.db"
    assert served("dlq", "init").returncode == 0
    port = free_port()
    scheduler = served.start("scheduler", "--module", "my_tasks.py", "--metrics-port", str(port))

    def shown() -> dict[str, list[dict[str, Any]]]:
        return exported(served.directory, scheduler.process.pid)

    def submitted() -> float:
        return sum(point["value"] for point in shown().get("scheduler_periodic_submissions_total", []))

    wait_until(lambda: submitted() >= 1, "a run of a schedule is exported")
    wait_until(lambda: shown()["scheduler_leader"][0]["value"] == 1, "it leads")
    ticks = {
        each["attributes"]["outcome"]: each["value"]
        for each in shown()["scheduler_periodic_submissions_total"]
        if each["attributes"]["task_name"] == "my_tasks:Tick"
    }
    assert ticks["success"] >= 1
    assert ticks["failure"] == 0  # told of before there is any: an alert sees the first
    wait_until(lambda: "delayed_tasks_pending" in shown(), "the whole system is exported")
    assert shown()["delayed_tasks_pending"][0]["value"] == 0
    assert len(shown()["task_stream_lag"]) == 9
    letters_up = {"attributes": {"source": "dead_letters"}, "value": 1}
    wait_until(
        lambda: any(letters_up.items() <= each.items() for each in shown().get("metrics_source_up", [])),
        "the database of dead letters is asked",
    )
    assert named(get(port, "/metrics")[1]) >= _PUBLISHED_BY_SCHEDULERS


def test_dead_letters_in_the_database_are_counted_by_task_and_status(
    served: Cli, redis_url: str, wait_until: Callable[..., None]
) -> None:
    served.environment["DIRACX_DB_URL_TASKDB"] = f"sqlite+aiosqlite:///{served.directory}/tasks.db"
    assert served("dlq", "init").returncode == 0
    worker = served.start("worker", "--module", "my_tasks.py")
    worker.until("ready")
    with RedisClient.from_url(redis_url) as client:
        client.xadd("diracx:tasks:normal:medium", {"data": b"no message"})
    worker.until("is put with the dead letters")
    port = free_port()
    served.start("scheduler", "--metrics-port", str(port))
    wait_until(lambda: "\nscheduler_leader 1\n" in get(port, "/metrics")[1], "it leads")
    found = samples(get(port, "/metrics")[1])
    assert found['dead_letter_queue_tasks{task_name="",status="PENDING"}'] == 1
    assert found['metrics_source_up{source="dead_letters"}'] == 1


def test_a_process_without_the_sdk_does_not_even_import_it(cli: Cli) -> None:
    program = (
        "import sys; from diracx.tasks.plumbing import telemetry; telemetry.count_submission('a', 'b', False); "
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=cli.environment)
