"""Metrics by OpenTelemetry and for Prometheus have the same values."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from diracx.tasks.plumbing.broker.models import TaskMessage
from diracx.tasks.plumbing.broker.streams import queue_stream
from diracx.tasks.testing.server import free_port
from redis import Redis as RedisClient
from support.command_line import MY_TASKS, Cli
from support.exported_metrics import SDK, exported, get, install_site, samples, series

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


def named(text: str) -> set[str]:
    """Metrics of a page of Prometheus, with values or without."""
    return {line.split(" ")[2] for line in text.splitlines() if line.startswith("# TYPE ")}


def with_sdk(served: Cli) -> Cli:
    (served.directory / "my_tasks.py").write_text(MY_TASKS + SDK)
    served.environment |= {
        "EXPORTED": str(served.directory / "exported"),
        "OTEL_METRIC_EXPORT_INTERVAL": "400",
    }
    return served


def test_a_worker_exports_the_same_values_to_opentelemetry_and_prometheus(
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
    metrics = samples(text)
    assert metrics[series("tasks_completed_total", **greet)] == 3
    assert metrics[series("tasks_submitted_total", **greet, delayed="false")] == 3
    assert named(text) >= _PUBLISHED_BY_WORKERS


_WORKLOAD = """
import asyncio
from dataclasses import dataclass

from diracx.tasks.plumbing import BaseTask, ExponentialBackoff, LockedObjectType, MutexLock


@dataclass
class Sleep(BaseTask):
    seconds: float

    async def execute(self):
        await asyncio.sleep(self.seconds)


class Fails(BaseTask):
    async def execute(self):
        await asyncio.sleep(0.2)
        raise ValueError("no")


class Retried(BaseTask):
    dlq_eligible = True
    retry_policy = ExponentialBackoff(base_delay_seconds=0.1, max_retries=1)

    async def execute(self):
        raise ValueError("no")


class Spawns(BaseTask):
    async def execute(self):
        for _ in range(5):
            await Sleep(0.0).schedule()


class Locked(BaseTask):
    @property
    def execution_locks(self):
        return [MutexLock(LockedObjectType("task"), "Locked")]

    async def execute(self):
        await asyncio.sleep(1)


class Both(BaseTask):
    async def execute(self):
        await Locked().schedule()
        await Locked().schedule()
"""


@pytest.mark.leaves_keys("diracx:tasks:dead-letters")
def test_metrics_have_the_meaning_of_the_published_package(
    served: Cli, redis_url: str, wait_until: Callable[..., None]
) -> None:
    """The figures are those that version 0.7.0 exported of the same tasks, but for the wait of `Locked`."""
    (served.directory / "load.py").write_text(_WORKLOAD + SDK)
    with_sdk(served)
    with RedisClient.from_url(redis_url) as client:
        client.xadd("diracx:tasks:normal:medium", {"data": b"no message"})
        client.xadd(
            "diracx:tasks:normal:medium", {"data": TaskMessage(task_id="g", task_name="load:Gone").dumpb()}
        )
    for seconds in ("0.5", "1.0", "0.1"):
        served("submit", "load:Sleep", "--args", f"[{seconds}]", "--module", "load.py")
    for name in ("Fails", "Fails", "Retried", "Spawns", "Both"):
        served("submit", f"load:{name}", "--module", "load.py")
    worker = served.start("worker", "--module", "load.py")

    def values(metric: str, *more: str) -> dict[Any, float]:
        """By name of the task and these attributes; of histograms, how many."""
        queue = {"priority": "normal", "size": "medium"}
        found: dict[Any, float] = {}
        for point in exported(served.directory, worker.process.pid).get(metric, []):
            attributes = dict(point["attributes"])
            name = attributes.get("task_name", "").removeprefix("load:")
            which = (name, *(attributes[each] for each in more)) if more else name
            if queue.items() <= attributes.items() or not name:
                found[which] = point["count"] if "count" in point else point["value"]
        return {which: value for which, value in found.items() if value}

    completed = {"Sleep": 8, "Spawns": 1, "Both": 1, "Locked": 2}
    wait_until(lambda: values("tasks_completed_total") == completed, "what succeeds has been counted")
    wait_until(lambda: values("tasks_failed_total") == {"Fails": 2, "Retried": 2}, "so has what fails")
    executions = completed | {"Fails": 2, "Retried": 2}
    assert values("task_duration_seconds") == values("task_queue_wait_seconds") == executions
    wait_until(
        lambda: values("tasks_given_up_total", "action") == {("Fails", "discarded"): 2, ("Retried", "dlq"): 1},
        "what is given up has been counted",
    )
    retried = {("Retried", "error"): 1, ("Locked", "lock_contention"): 1}
    assert values("tasks_retried_total", "reason") == retried
    assert values("tasks_submitted_total", "delayed") == {("Sleep", False): 5, ("Locked", False): 2}
    assert values("task_messages_rejected_total", "reason") == {("", "unparsable"): 1, ("", "unknown_task"): 1}
    assert values("worker_max_concurrent_tasks", "worker_size") == {("", "medium"): 10}
    sums = {
        point["attributes"]["task_name"]: point["sum"]
        for point in exported(served.directory, worker.process.pid)["task_duration_seconds"]
    }
    for name, least in {"load:Sleep": 1.6, "load:Fails": 0.4, "load:Locked": 2.0}.items():
        assert 0.99 * least <= sums[name] < least + 30, "seconds"  # clocks differ
    wait_until(lambda: values("tasks_in_progress") == {}, "nothing runs any more")
    metrics = exported(served.directory, worker.process.pid)["tasks_in_progress"]
    assert {point["attributes"]["task_name"].removeprefix("load:") for point in metrics} >= set(executions)


@pytest.mark.leaves_keys("diracx:tasks:normal:*")  # it waits there
def test_tasks_returned_by_a_stopped_worker_are_not_counted_as_abandoned(
    served: Cli, wait_until: Callable[..., None]
) -> None:
    with_sdk(served)
    worker = served.start("worker", "--module", "my_tasks.py", "--grace", "0")
    begun = served.directory / "begun"
    served.mine("submit", "my_tasks:Slow", "--args", json.dumps([str(begun), 60]))
    wait_until(begun.exists, "it runs")
    worker.process.terminate()
    assert worker.ends() == 0, worker.output
    metrics = exported(served.directory, worker.process.pid)

    def value(metric: str, **attributes: str) -> float:
        wanted = {"task_name": "my_tasks:Slow", **attributes}
        return sum(each["value"] for each in metrics[metric] if wanted.items() <= each["attributes"].items())

    assert value("tasks_retried_total", reason="error") == 1
    assert value("tasks_given_up_total") == 0


@pytest.mark.leaves_keys("diracx:tasks:normal:medium")  # no worker runs
def test_the_leading_scheduler_exports_the_same_values_to_opentelemetry_and_prometheus(
    served: Cli, wait_until: Callable[..., None]
) -> None:
    with_sdk(served)
    install_site(served.directory)
    served.environment["DIRACX_DB_URL_TASKDB"] = f"sqlite+aiosqlite:///{served.directory}/tasks.db"
    assert served("dlq", "init").returncode == 0
    port = free_port()
    arguments = ("scheduler", "--module", "my_tasks.py", "--metrics-port", str(port))
    scheduler = served.start(*arguments, new_python=True)  # else the distribution is not found

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
    assert ticks["failure"] == 0  # exported before there is any: an alert sees the first
    wait_until(lambda: "delayed_tasks_pending" in shown(), "the whole system is exported")
    assert shown()["delayed_tasks_pending"][0]["value"] == 0
    assert len(shown()["task_stream_lag"]) == 9
    dead_letters_up = {"attributes": {"source": "dead_letters"}, "value": 1}
    wait_until(
        lambda: any(dead_letters_up.items() <= each.items() for each in shown().get("metrics_source_up", [])),
        "the database of dead letters is asked",
    )
    assert named(get(port, "/metrics")[1]) >= _PUBLISHED_BY_SCHEDULERS
    wait_until(lambda: "site_weight" in shown(), "metrics of other distributions are exported")
    assert shown()["site_weight"][0]["value"] == 2.5


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
    wait_until(lambda: "\nscheduler_leader 1.0\n" in get(port, "/metrics")[1], "it leads")
    found = samples(get(port, "/metrics")[1])
    assert found[series("dead_letter_queue_tasks", task_name="", status="PENDING")] == 1
    assert found['metrics_source_up{source="dead_letters"}'] == 1


class _Collector(ThreadingHTTPServer):
    """Collector of OTLP over HTTP, as protobuf."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receive)
        self.metrics: dict[str, Any] = {}
        self.components: set[str] = set()
        self.spans: list[Any] = []
        self.logs: list[str] = []

    def take(self, path: str, body: bytes) -> None:
        from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        if path == "/v1/metrics":
            for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                names = {each.key: each.value.string_value for each in resource.resource.attributes}
                self.components.add(names["diracx.component"])
                for scope in resource.scope_metrics:
                    self.metrics |= {metric.name: metric for metric in scope.metrics}
        elif path == "/v1/traces":
            for found in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.spans += [span for scope in found.scope_spans for span in scope.spans]
        else:
            for sent in ExportLogsServiceRequest.FromString(body).resource_logs:
                self.logs += [each.body.string_value for scope in sent.scope_logs for each in scope.log_records]


class _Receive(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, _Collector)
        body = self.rfile.read(int(self.headers["content-length"]))
        packed = self.headers.get("content-encoding") == "gzip"
        self.server.take(self.path, gzip.decompress(body) if packed else body)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def collector() -> Iterator[_Collector]:
    with _Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _to(collector: _Collector) -> dict[str, str]:
    """Variables of a process that sends everything to the collector at once."""
    return {
        "DIRACX_OTEL_ENABLED": "true",
        "DIRACX_OTEL_PROTOCOL": "http",
        "DIRACX_OTEL_HTTP_ENDPOINT": f"http://127.0.0.1:{collector.server_address[1]}",
        "OTEL_METRIC_EXPORT_INTERVAL": "300",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_BLRP_SCHEDULE_DELAY": "100",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.mark.parametrize("role", ["worker", "scheduler"])
@pytest.mark.leaves_keys("diracx:tasks:normal:medium")  # a scheduler alone fetches nothing
def test_a_collector_of_diracx_gets_metrics_traces_and_logs(
    collector: _Collector, served: Cli, wait_until: Callable[..., None], role: str
) -> None:
    served.environment |= _to(collector)
    process = served.start(role, "--module", "my_tasks.py")
    if role == "scheduler":
        wait_until(lambda: "task_stream_lag" in collector.metrics, "the metrics of the whole system are exported")
        [leader] = collector.metrics["scheduler_leader"].gauge.data_points
        assert leader.as_int == 1
    else:
        process.until("ready")
        served.mine("submit", "my_tasks:Spawn")
        wait_until(lambda: "tasks_completed_total" in collector.metrics, "a task is counted")
        wait_until(lambda: collector.logs, "something is logged")
    assert collector.components == {f"tasks-{role}"}


_TRACED = """
import logging

from diracx.tasks.plumbing import BaseTask, ExponentialBackoff, Priority, Size, spawn_with_callback
from diracx.tasks.plumbing.persistence import TaskDB


class Child(BaseTask):
    async def execute(self, db: TaskDB):
        return len(await db.search())


class Root(BaseTask):
    priority = Priority.REALTIME
    dlq_eligible = True
    retry_policy = ExponentialBackoff(base_delay_seconds=0, max_retries=1)

    async def execute(self):
        await Child().schedule()
        logging.getLogger("diracx.mine").info("traced")
        raise ValueError("broken by redis://u:sesame@host/1")
"""


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@pytest.mark.leaves_keys("diracx:tasks:delayed:reasons")
def test_spans_have_the_names_links_and_attributes_of_the_published_package(
    collector: _Collector, served: Cli, wait_until: Callable[..., None]
) -> None:
    (served.directory / "traced.py").write_text(_TRACED)
    served.environment |= {
        **_to(collector),
        "DIRACX_LOG_FORMAT": "json",
        "DIRACX_DB_URL_TASKDB": f"sqlite+aiosqlite:///{served.directory}/tasks.db",
    }
    assert served("dlq", "init").returncode == 0
    worker = served.start("worker", "--module", "traced.py")
    worker.until("ready")
    done = served("submit", "traced:Root", "--module", "traced.py", "--json")
    task_id = json.loads(done.stdout)["task_id"]

    def named(name: str) -> list[Any]:
        return sorted((s for s in collector.spans if s.name == name), key=lambda s: s.start_time_unix_nano)

    wait_until(lambda: len(named("task.process traced:Child")) == 2, "both children are traced")
    wait_until(lambda: len(named("task.process traced:Root")) == 2, "both attempts are traced")
    first, second = named("task.process traced:Root")
    assert (first.kind, first.parent_span_id, list(first.links)) == (
        5,
        b"",
        [],
    )  # a consumer, of an untraced submitter
    assert [link.span_id for link in second.links] == [first.span_id]
    assert second.trace_id != first.trace_id
    reported = [_plain(span.attributes) for span in (first, second)]
    for number, attributes in enumerate(reported):
        assert 0 <= attributes.pop("task.queue_wait_s") < 60
        assert re.fullmatch(r"\d+-\d+", attributes.pop("messaging.message.id"))
        stream = attributes.pop("messaging.destination.name")
        assert queue_stream(stream) == "diracx:tasks:realtime:medium"  # requeued on a busy machine
        assert attributes == {
            "task.name": "traced:Root",
            "task.id": task_id,
            "task.priority": "realtime",
            "task.size": "medium",
            "task.retry_count": number,
            "task.reclaimed": False,
        }
    [retried], [dropped] = first.events, second.events
    assert (retried.name, dropped.name) == ("task.retry_scheduled", "task.given_up")
    assert {"task.retry.reason": "error", "task.retry.attempt": 1}.items() <= _plain(retried.attributes).items()
    assert _plain(dropped.attributes) == {"task.action": "dlq"}

    executed = named("task.execute traced:Root")
    assert [span.parent_span_id for span in executed] == [first.span_id, second.span_id]
    for number, span in enumerate(executed):
        attributes = _plain(span.attributes)
        assert 0 < attributes.pop("task.duration_ms") < 60_000
        assert attributes == {
            "task.name": "traced:Root",
            "task.id": task_id,
            "task.priority": "realtime",
            "task.size": "medium",
            "task.retry_count": number,
            "task.status": "error",
            "error.type": "ValueError",
        }
        assert (span.status.code, span.status.message) == (2, "ValueError: broken by redis://u:***@host/1")
        [raised] = span.events
        assert raised.name == "exception"
        assert "Traceback" in _plain(raised.attributes)["exception.stacktrace"]

    submitted = named("task.submit traced:Child")
    assert [span.parent_span_id for span in submitted] == [span.span_id for span in executed]
    assert {span.kind for span in submitted} == {4}  # a producer
    attributes = _plain(submitted[0].attributes)
    child_id = attributes.pop("task.id")
    assert attributes == {
        "task.name": "traced:Child",
        "task.priority": "normal",
        "task.size": "medium",
        "task.delayed": False,
    }
    processed = {_plain(span.attributes)["task.id"]: span for span in named("task.process traced:Child")}
    [link] = processed[child_id].links
    assert (link.trace_id, link.span_id) == (submitted[0].trace_id, submitted[0].span_id)
    [child] = [s for s in named("task.execute traced:Child") if s.parent_span_id == processed[child_id].span_id]
    assert _plain(child.attributes)["task.status"] == "ok"
    statements = [span for span in collector.spans if span.parent_span_id == child.span_id]
    assert any("db.system.name" in _plain(span.attributes) for span in statements), "SQL is traced, too"
    wait_until(lambda: any(name.startswith("db.client.") for name in collector.metrics), "SQL is measured, too")

    [logged, _] = [json.loads(line) for line in worker.output.splitlines() if '"traced"' in line]
    assert (logged["trace_id"], logged["span_id"]) == (executed[0].trace_id.hex(), executed[0].span_id.hex())
    assert "sesame" not in str(collector.spans)


def test_telemetry_that_cannot_be_set_up_is_reported_in_one_line(
    served: Cli, one_line: Callable[..., str]
) -> None:
    served.environment |= {"DIRACX_OTEL_ENABLED": "true", "DIRACX_OTEL_PROTOCOL": "carrier pigeon"}
    one_line(
        served("worker", "--module", "my_tasks.py"), 1, "OpenTelemetry cannot be set up", "DIRACX_OTEL_ENABLED"
    )


def test_a_process_without_the_sdk_does_not_even_import_it(cli: Cli) -> None:
    program = (
        "import sys; from diracx.tasks.plumbing.broker import telemetry; "
        "telemetry.count_submission('a', 'b', False); "
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=cli.environment)
