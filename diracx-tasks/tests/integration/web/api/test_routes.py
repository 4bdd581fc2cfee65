"""P51: submission of tasks from DiracX routes."""

from __future__ import annotations

import pytest
from diracx.routers.fastapi_classes import DiracxRouter
from diracx.tasks.jobs import DummyJobExecutorTask
from diracx.tasks.plumbing import CallbackSpawner
from diracx.tasks.plumbing.broker.address import AddressError
from diracx.tasks.plumbing.broker.models import TaskMessage
from diracx.tasks.web.api.environment import context_from_environment
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient
from redis import Redis
from support.waiting import eventually

router = DiracxRouter()


@router.post("/run/{job_id}")
async def run(job_id: int) -> str:
    return await DummyJobExecutorTask(job_id).schedule()


@router.post("/group")
async def group(spawn: CallbackSpawner) -> str:
    return await spawn([DummyJobExecutorTask(1), DummyJobExecutorTask(2)], DummyJobExecutorTask(3))


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    app.include_router(router)
    return TestClient(app)


def messages(redis_url: str) -> list[TaskMessage]:
    with Redis.from_url(redis_url) as redis:
        entries = redis.xrange("diracx:tasks:normal:large")
        redis.flushall()
    return [TaskMessage.loadb(fields[b"data"]) for _, fields in entries]


def test_P51_a_route_schedules_a_task(client: TestClient, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIRACX_TASKS_REDIS_URL", redis_url)
    with client:
        responses = [client.post(f"/run/{job_id}") for job_id in (7, 8)]
    assert [response.status_code for response in responses] == [200, 200]
    sent = messages(redis_url)
    assert [message.task_id for message in sent] == [response.json() for response in responses]
    assert [message.task_args for message in sent] == [[7], [8]]
    assert sent[0].task_name == "jobs:DummyJobExecutorTask"


def test_P51_a_route_spawns_a_group(client: TestClient, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIRACX_TASKS_REDIS_URL", redis_url)
    with client:
        assert client.post("/group").status_code == 200
    assert [message.task_args for message in messages(redis_url)] == [[1], [2]]


def test_connections_of_routes_are_closed_at_the_end_of_their_event_loop(
    client: TestClient, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIRACX_TASKS_REDIS_URL", redis_url)
    with Redis.from_url(redis_url) as redis:
        before = {each["id"] for each in redis.client_list()}
        for job_id in range(3):  # each in a loop of its own
            assert client.post(f"/run/{job_id}").status_code == 200
        eventually(lambda: before.issuperset(each["id"] for each in redis.client_list()))
    assert len(messages(redis_url)) == 3


def test_P51_a_route_without_a_broker_is_an_error_with_the_remedy(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DIRACX_TASKS_REDIS_URL", raising=False)
    with client, pytest.raises(RuntimeError, match="DIRACX_TASKS_REDIS_URL"):
        client.post("/run/1")


@pytest.mark.parametrize(
    "url", ["redis://:sesame@localhost?decode_responses=true", "redis://:sesame@localhost/one"]
)
async def test_an_invalid_url_in_the_environment_is_an_error_of_one_line(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, url: str
) -> None:
    monkeypatch.setenv("DIRACX_TASKS_REDIS_URL", url)
    with client, pytest.raises(AddressError, match=r"^DIRACX_TASKS_REDIS_URL: ") as caught:
        client.post("/run/1")
    with pytest.raises(HTTPException, match="correct DIRACX_TASKS_REDIS_URL") as refused:
        await context_from_environment()
    assert refused.value.status_code == 503
    assert str(caught.value) in caplog.text
    assert "sesame" not in str(caught.value) + caplog.text + refused.value.detail
