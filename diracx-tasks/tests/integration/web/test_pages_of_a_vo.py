"""Pages of an operator's lists contain nothing about tasks of other VOs, cursors included."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from html import unescape
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote

import httpx
import pytest
from diracx.tasks import operations as monitor
from diracx.tasks.plumbing import BaseTask, NoRetry
from diracx.tasks.plumbing.broker.models import Submission, TaskMessage
from diracx.tasks.plumbing.worker import reporter
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.config_repository import ConfigRepository
from support.diracx_application import make_application, set_environment, token_maker, with_short_streams
from support.permission_tables import BELOW, client_with
from support.waiting import until

API = "/api/tasks"
#: More than the pages that are read to fill one page of a VO: with limit 1, and with that of the dashboard (50).
FEW, MANY = 25, 1_050
LISTS = ("queues/normal:large", "running", "delayed", "failures", "waiting-dead-letters")


class Run(BaseTask):
    """Runs until it is cancelled."""

    async def execute(self) -> None:
        await asyncio.Event().wait()


class Fail(BaseTask):
    """Ends as a dead letter."""

    retry_policy = NoRetry()
    dlq_eligible = True

    async def execute(self) -> None:
        raise ValueError("of its VO")


@asynccontextmanager
async def busy_system(redis_url: str) -> AsyncIterator[None]:
    """In every list, one task of lhcb is after many of gridpp."""
    due = datetime.now(UTC) + timedelta(minutes=30)
    settings = {"grace_seconds": 0.0}
    with patch.object(reporter, "REPORT_SECONDS", 0.3):  # reports are sent every 5 s by default
        async with (
            Redis.from_url(redis_url) as redis,
            TaskSystem(
                [Run, Fail], redis_url=redis_url, workers=1, concurrency=60, task_db_url=None, settings=settings
            ) as system,
        ):
            ran = 0
            for vo, few, many in (("gridpp", FEW, MANY), ("lhcb", 1, 1), ("gridpp", FEW, 0)):
                labels = {"vo": vo}
                for _ in range(few):
                    await Run().schedule(labels=labels)
                    await Fail().schedule(labels=labels)
                for kind, at_time in (("queued", None), ("delayed", due + timedelta(seconds=vo == "lhcb"))):
                    ids = [f"{kind}-{number}-of-{vo}-{'ü' * 200}" for number in range(many)]
                    messages = [TaskMessage(task_id=each, task_name="of:Large", labels=labels) for each in ids]
                    large = "diracx:tasks:normal:large"
                    await system.broker.submit([Submission(message, large, at_time) for message in messages])
                ran += few

                async def have_ran(number: int = ran) -> bool:
                    lists = (monitor.running, monitor.failures, monitor.waiting_dead_letters)
                    return {len((await read(redis)).items) for read in lists} == {number}

                await until(have_ran)
            yield


@pytest.fixture
async def application(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    repository = ConfigRepository(tmp_path / "config", vos=("lhcb", "gridpp"))
    set_environment(monkeypatch, tmp_path, redis_url, repository.url)
    try:
        async with busy_system(redis_url):
            app = with_short_streams(make_application(), 0.02)  # live pages send what they show, and end
            async with app.router.lifespan_context(app):
                yield app
    finally:
        async with Redis.from_url(redis_url) as client:
            await client.flushall()


async def pages(client: httpx.AsyncClient, path: str, limit: int) -> AsyncIterator[httpx.Response]:
    """All pages of a list."""
    params: dict[str, Any] = {"limit": limit}
    while True:
        response = await client.get(f"{API}/{path}", params=params)
        assert response.status_code == 200, response.text
        yield response
        if (after := response.json()["after"]) is None:
            return
        params["after"] = after


def about(task: dict[str, Any]) -> Iterator[str]:
    """Its ids and times, as a response or a cursor may have them."""
    yield from (str(task[name]) for name in ("task_id", "entry", "id") if name in task)
    for name in ("waiting_since", "since", "due", "at", "buried"):
        if task.get(name):
            moment = datetime.fromisoformat(task[name])
            yield from (task[name], f"{moment.timestamp():.3f}", f"{moment.timestamp() * 1000:.0f}")


def seen(response: httpx.Response) -> str:
    """A response, with its cursors also decoded."""
    parts = [response.text]
    for cursor in re.findall(r'(?:[?&]after=|"after":\s*")([^&"]+)', unescape(unquote(response.text))):
        with suppress(ValueError):
            parts.append(base64.urlsafe_b64decode(cursor).decode("latin-1"))
    return "\n".join(parts)


async def test_responses_to_an_operator_have_no_ids_and_times_of_other_vos(application: Any) -> None:
    token = token_maker()
    async with client_with(application, token("ServiceAdministrator")) as administrator:
        tasks = [
            task
            for path in LISTS
            async for page in pages(administrator, path, 500)
            for task in page.json()["items"]
        ]
    own, hidden = (
        {text for task in tasks if task["vo"] == vo for text in about(task)} for vo in ("lhcb", "gridpp")
    )
    hidden -= own
    assert len(hidden) > 2 * MANY
    responses, cursors = [], set()
    async with client_with(application, token("NormalUser", "Operator")) as operator:
        for path in LISTS:
            limit = 1 if path in ("running", "failures", "waiting-dead-letters") else 10
            read = [page async for page in pages(operator, path, limit)]
            assert [task["vo"] for page in read for task in page.json()["items"]] == ["lhcb"], path
            assert len(read) > 1, path
            responses += read
            cursors.add(read[0].json()["after"])
        # Those of another list must not be quoted either.
        for path in LISTS:
            responses += [await operator.get(f"{API}/{path}", params={"after": each}) for each in cursors]
        for path in (*LISTS, "dead-letters"):
            page = await operator.get(f"{BELOW}/{path}".replace("waiting-", ""))
            stream = await operator.get(f"{BELOW}/live/{path}".replace("waiting-", ""))
            assert page.status_code == 200
            responses += [page, stream]
        texts = [(str(response.url), seen(response)) for response in responses]
        leaks = {(url, each) for url, text in texts for each in hidden | {"gridpp"} if each in text}
        assert not leaks, sorted(leaks)[:20]
        for path in LISTS:
            for made in ("1796140297701-0", "1796140297701.0 gridpp", "é", "A" * 44):
                response = await operator.get(f"{API}/{path}", params={"after": made})
                assert response.status_code == 404, (path, made)
                assert "not from a page before" in response.text
