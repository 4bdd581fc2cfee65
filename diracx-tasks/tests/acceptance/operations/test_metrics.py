"""Metrics, health and traces of real processes; dashboards and alert rules use existing metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from diracx.tasks.plumbing import BaseTask
from diracx.tasks.plumbing.base_task import schedule_many
from diracx.tasks.testing import TaskSystem
from diracx.tasks.testing.server import free_port
from redis import Redis as RedisClient
from support.command_line import Cli
from support.exported_metrics import get, samples, series
from support.paths import ROOT

DEPLOY = ROOT / "deploy"


def test_a_worker_serves_its_metrics_and_readiness(served: Cli, wait_until: Callable[..., None]) -> None:
    port = free_port()
    worker = served.start("worker", "--module", "my_tasks.py", "--metrics-port", str(port))
    wait_until(lambda: get(port, "/readyz")[0] == 200, "it is ready")
    assert get(port, "/healthz") == (200, "ok\n")
    assert get(port, "/else")[0] == 404
    # An alert that waits for an increase sees the first event as well.
    at_first = samples(get(port, "/metrics")[1])
    for priority in ("realtime", "normal", "background"):
        which = {"task_name": "my_tasks:Fail", "priority": priority, "size": "medium"}
        assert at_first[series("tasks_given_up_total", **which, action="dlq")] == 0
        assert at_first[series("task_leases_lost_total", **which)] == 0
    for reason in ("unknown_task", "unparsable", "arguments", "poison"):
        assert at_first[f'task_messages_rejected_total{{reason="{reason}"}}'] == 0
    served.mine("submit", "my_tasks:Greet", "--args", '["Ada"]')
    served.mine("submit", "my_tasks:Fail")
    labels = {"task_name": "my_tasks:Greet", "priority": "normal", "size": "medium"}

    def counted() -> dict[str, float]:
        return samples(get(port, "/metrics")[1])

    failing = labels | {"task_name": "my_tasks:Fail"}
    wait_until(
        lambda: (
            counted().get(series("tasks_completed_total", **labels)) == 1
            and counted().get(series("tasks_failed_total", **failing)) == 1
        ),
        "both are counted",
    )
    found = counted()
    assert found[series("task_duration_seconds_count", **labels)] == 1
    assert found[series("task_queue_wait_seconds_bucket", **labels, le="+Inf")] == 1
    assert found['worker_max_concurrent_tasks{worker_size="medium"}'] == 10
    assert found[series("tasks_given_up_total", **failing, action="discarded")] == 1
    worker.process.terminate()
    assert worker.ends() == 0


def test_only_the_leading_scheduler_exports_metrics_of_the_whole_system(
    served: Cli, wait_until: Callable[..., None]
) -> None:
    served.mine("submit", "my_tasks:Greet", "--args", '["Ada"]')
    first, second = free_port(), free_port()
    served.start("scheduler", "--metrics-port", str(first))
    wait_until(lambda: "\nscheduler_leader 1.0\n" in get(first, "/metrics")[1], "it leads")
    found = samples(get(first, "/metrics")[1])
    stream = {"stream": "diracx:tasks:normal:medium", "priority": "normal", "size": "medium"}
    assert found[series("task_stream_lag", **stream)] == 1
    assert found["delayed_tasks_pending"] == 0
    without_worker = '{check="queue_without_worker",severity="critical",subject="normal:medium"}'
    assert (found["health_status"], found[f"health_alerts{without_worker}"]) == (2, 1)
    assert 0 < time.time() - found[f"health_alert_since_seconds{without_worker}"] < 60
    assert get(first, "/readyz") == (200, "ok\ncritical queue_without_worker\n")
    served.start("scheduler", "--metrics-port", str(second))
    wait_until(lambda: get(second, "/readyz")[0] == 200, "the second is ready")
    assert samples(get(second, "/metrics")[1]) == {
        "scheduler_leader": 0,
        "delayed_tasks_unparsable_total": 0,
    }
    worker = served.start("worker", "--module", "my_tasks.py")
    worker.until("ready")
    wait_until(
        lambda: samples(get(first, "/metrics")[1])[series("task_stream_length", **stream)] == 0, "it is done"
    )
    wait_until(lambda: samples(get(first, "/metrics")[1])["health_status"] == 0, "all is well")
    assert get(first, "/readyz") == (200, "ok\n")


@pytest.mark.leaves_keys("diracx:tasks:dead-letters")
def test_unreadable_messages_of_version_0_7_are_counted(
    served: Cli, redis_url: str, wait_until: Callable[..., None]
) -> None:
    with RedisClient.from_url(redis_url) as client:
        client.zadd("diracx:tasks:delayed", {b"no message": 1, b"nor this": 2})
        port = free_port()
        served.start("scheduler", "--metrics-port", str(port))
        counted = "\ndelayed_tasks_unparsable_total 2.0\n"
        wait_until(lambda: counted in get(port, "/metrics")[1], "both are counted")
        assert client.xlen("diracx:tasks:dead-letters") == 2, "and kept"


def test_a_port_that_is_taken_is_reported_in_one_line(served: Cli, wait_until: Callable[..., None]) -> None:
    port = free_port()
    served.start("worker", "--metrics-port", str(port))
    wait_until(lambda: get(port, "/healthz")[0] == 200, "the first has it")
    refused = served("worker", "--metrics-port", str(port))
    assert refused.returncode == 1
    assert f"error: cannot serve metrics on 127.0.0.1:{port}" in refused.stderr.splitlines()[-1]


# --- traces -------------------------------------------------------------------------------------------------


class Grandchild(BaseTask):
    async def execute(self) -> None: ...


@dataclass
class Parent(BaseTask):
    fails: bool = False
    password: str = "sesame-open"  # to be looked for

    secret_fields = frozenset({"password"})

    async def execute(self) -> str:
        if self.fails:
            raise ValueError(f"refused: {self.password}")
        return await Grandchild().schedule()


async def test_each_task_is_a_trace_of_its_own_that_is_linked_to_its_submission(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)  # those of other tests go on without
    async with TaskSystem([Parent, Grandchild], redis_url=redis_url) as system:
        with trace.get_tracer("test").start_as_current_span("request"):
            done, failed = await schedule_many([Parent(), Parent(fails=True)])
        child = (await system.result(done)).return_value
        assert (await system.result(failed)).is_err
        await system.result(child)
        await system.drain()
    provider.shutdown()
    found = {
        (s.name.partition(" ")[0], (s.attributes or {}).get("task.id")): s for s in exporter.get_finished_spans()
    }
    request = found["request", None]
    for task_id, submitter in ((done, request), (failed, request), (child, found["task.execute", done])):
        submitted, processed = found["task.submit", task_id], found["task.process", task_id]
        assert submitted.parent is not None
        assert submitted.parent.span_id == submitter.context.span_id
        assert processed.parent is None
        assert [link.context.span_id for link in processed.links] == [submitted.context.span_id]
        executed = found["task.execute", task_id]
        assert executed.parent is not None
        assert executed.parent.span_id == processed.context.span_id
    assert len({span.context.trace_id for span in found.values()}) == 4, "the request and three tasks"
    assert found["task.execute", failed].status.description == "ValueError: refused: •••"
    assert not [span for span in found.values() if "sesame" in span.to_json()]
