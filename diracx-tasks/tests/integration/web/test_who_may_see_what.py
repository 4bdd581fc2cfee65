"""Access of each role to each route, as in docs/reference/who-may-see-what.md."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from diracx.tasks import operations as monitor
from diracx.tasks.operations.audit import AuditLog, read_audit
from diracx.tasks.plumbing import (
    BaseLock,
    BaseTask,
    CallbackSpawner,
    ExponentialBackoff,
    IntervalSeconds,
    MutexLock,
    NoRetry,
    PeriodicVoAwareBaseTask,
    Size,
    register_locked_object_type,
)
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.broker.models import Submission, TaskMessage
from diracx.tasks.plumbing.persistence import DeadLetter
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.worker import reporter
from diracx.tasks.testing import TaskSystem
from diracx.tasks.web.context import AppContext
from fastapi.routing import APIRoute
from redis.asyncio import Redis
from support.config_repository import ConfigRepository
from support.diracx_application import make_application, set_environment, token_maker, with_short_streams
from support.fixed_vos import ReaderWithVos
from support.permission_tables import BELOW, REFUSED, Row, client_with, rows
from support.waiting import until

API = "/api/tasks"
SITE = register_locked_object_type("whose_site")
VOS = ("lhcb", "gridpp")
#: What is in the arguments of all that belongs to a VO, or (None) to none: nothing else has it.
MARKS = {"lhcb": "mark-of-lhcb", "gridpp": "mark-of-gridpp", None: "mark-of-none"}
ROLES = {
    "user": ("NormalUser",),
    "operator": ("NormalUser", "Operator"),
    "administrator": ("ServiceAdministrator",),
}


# --- a system in which each VO has something of everything -----------------------------------------------------


@dataclass
class Run(BaseTask):
    """Runs until it is cancelled, and holds a lock."""

    vo: str | None
    note: str

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(SITE, self.note)]

    async def execute(self) -> None:
        await asyncio.sleep(3600)


@dataclass
class Flaky(BaseTask):
    """Is tried again in an hour."""

    note: str
    vo: str | None
    retry_policy = ExponentialBackoff(base_delay_seconds=3600, max_retries=3)

    async def execute(self) -> None:
        raise TimeoutError(self.note)


@dataclass
class Fail(BaseTask):
    """Ends as a dead letter. Its label is its VO."""

    note: str
    retry_policy = NoRetry()
    dlq_eligible = True

    async def execute(self) -> None:
        raise ValueError(self.note)


@dataclass
class Large(BaseTask):
    """For a worker that does not run."""

    vo: str | None
    note: str
    size = Size.LARGE

    async def execute(self) -> None: ...


@dataclass
class Split(BaseTask):
    """A callback group."""

    async def execute(self, spawn: CallbackSpawner) -> str:
        return await spawn([Run("", "a child")], Fail("its parent"))


class Tidy(PeriodicVoAwareBaseTask):
    """Has a schedule for each VO."""

    default_schedule = IntervalSeconds(3600)

    async def execute(self) -> None: ...


@asynccontextmanager
async def busy_system(redis_url: str) -> AsyncIterator[AppContext]:
    tasks = {f"whose:{task.__name__}": task for task in (Run, Flaky, Fail, Split, Tidy)}
    with patch.object(reporter, "REPORT_SECONDS", 0.3):  # reports are sent every 5 s by default
        async with TaskSystem(
            tasks, redis_url=redis_url, workers=1, vos=VOS, settings={"grace_seconds": 0.0}
        ) as system:
            redis, db = system.broker.redis, system.task_db
            assert db is not None
            for vo, mark in MARKS.items():
                labels = {} if vo is None else {"vo": vo}
                await Run(vo, mark).schedule()
                await Flaky(mark, vo).schedule()
                await Fail(mark).schedule(labels=labels)
                large = TaskMessage(task_id=f"large-{mark}", task_name="whose:Large", task_args=[vo, mark])
                await system.broker.submit([Submission(large, "diracx:tasks:normal:large")])
                message = TaskMessage(
                    task_id=f"waiting-{mark}", task_name="whose:Fail", labels=labels, task_args=[mark]
                )
                dead_letter = DeadLetter(
                    task_id=f"waiting-{mark}",
                    task_name="whose:Fail",
                    vo=vo,
                    reason="exhausted",
                    detail=mark,
                    data=message.dumpb(),
                )
                fields: Any = dead_letter.to_stored()
                await redis.xadd(keys.DEAD_LETTERS, fields)

                async def nothing() -> str:
                    return "nothing"

                await AuditLog(redis, "fred", "api", vo).perform("submit pilot", mark, nothing)
            await Split().schedule()

            async def has_happened() -> bool:
                snapshot = await monitor.snapshot(redis)
                async with db:
                    dead_letters = await db.search()
                failures = await monitor.failures(redis)
                running = await monitor.running(redis)
                return (len(dead_letters), len(failures.items), len(running.items)) == (3, 6, 4) and (
                    snapshot.schedules == 2 and snapshot.groups == 1 and snapshot.delayed["retry"] == 3
                )

            await until(has_happened)
            registry = TaskRegistry.of({**tasks, "whose:Large": Large})
            reader = ReaderWithVos()
            reader.vos = VOS
            context = AppContext(system.broker, registry, reader, db, "test")
            try:
                yield context
            finally:
                await redis.delete(keys.DEAD_LETTERS)


class Site:
    """The DiracX application with the dashboard, and its users."""

    def __init__(self, app: Any, context: AppContext, token: Callable[..., str]) -> None:
        self.app = app
        self.context = context
        self._token = token

    @asynccontextmanager
    async def user(self, role: str, vo: str = "lhcb") -> AsyncIterator[httpx.AsyncClient]:
        """A client of that role."""
        token = None if role == "anonymous" else self._token(*ROLES[role], vo=vo)
        async with client_with(self.app, token) as client:
            yield client


@pytest.fixture
async def site(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    from diracx.tasks.web.api import environment

    repository = ConfigRepository(tmp_path / "config", vos=VOS)
    set_environment(monkeypatch, tmp_path, redis_url, repository.url)
    try:
        async with busy_system(redis_url) as context:

            async def this() -> AppContext:
                return context

            monkeypatch.setattr(environment, "open_context", this)
            app = with_short_streams(make_application(), 0.02)  # live pages send what they show, and end
            async with app.router.lifespan_context(app):
                yield Site(app, context, token_maker())
    finally:
        async with Redis.from_url(redis_url) as client:
            await client.flushall()


# --- the table --------------------------------------------------------------------------------------------------


ROUTES, PAGES = (
    rows(heading, ("anonymous", *ROLES)) for heading in ("HTTP below `/api/tasks`", "Pages about tasks")
)
PROBES = ["GET /healthz", "GET /readyz"]  # handled before any route


def test_every_route_of_the_application_is_in_the_table() -> None:
    from diracx.tasks.web.api.api import router

    routes = [
        f"{method} {route.path}"
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    ]
    assert sorted(map(str, ROUTES)) == sorted(routes)


def test_every_page_and_action_of_the_dashboard_is_in_the_table() -> None:
    from diracx.tasks.web.auth.code_flow import CodeFlow
    from diracx.tasks.web.auth.diracx import DiracxBackend
    from diracx.tasks.web.dashboard import DashboardApp

    async def none() -> Any:
        raise NotImplementedError

    app: Any = DashboardApp(none, DiracxBackend(CodeFlow(BELOW)), extensions=[])
    found, streams = [*PROBES], []
    for route in app._app._app.routes:
        methods = (getattr(route, "methods", None) or {"GET"}) - {"HEAD"}
        if route.path.startswith("/live"):
            streams.append(route.path.removeprefix("/live"))
        else:
            found += [f"{method} {route.path}" for method in methods]
    assert sorted(map(str, PAGES)) == sorted(found)
    assert {f"GET {path}" for path in streams} < set(found)


# --- what each role gets ----------------------------------------------------------------------------------------


def addresses(row: Row, **values: str) -> str:
    """The path of a row, with something there in the place of each placeholder."""
    return re.sub(r"\{(\w+)\}", lambda found: values[found[1]], row.path)


def marks_in(text: str) -> set[str]:
    return {mark for mark in MARKS.values() if mark in text}


def expected(cell: str, vo: str, everything: set[str]) -> set[str]:
    """The marks that a response may have."""
    return {"own VO": {MARKS[vo]}, "all": everything}.get(cell, set()) & everything


async def test_each_role_reads_by_http_as_in_the_table(site: Site) -> None:
    redis = site.context.redis
    lock = f"lock:mutex:{SITE}:{MARKS[None]}"
    [group] = await monitor.groups(redis)
    dead_letters = await dead_letter_ids(site)
    wrong = []
    for role in ("anonymous", *ROLES):
        for vo in VOS:
            async with site.user(role, vo) as client:
                for row in ROUTES:
                    if row.method != "GET":
                        continue
                    key = dead_letters[MARKS[vo]]
                    path = addresses(row, queue="normal:large", group_id=group.group_id, key=key)
                    response = await client.get(
                        f"{API}{path}", params={"key": lock} if "locks/one" in path else {}
                    )
                    cell = row.cells[role]
                    refused = 401 if role == "anonymous" else 403
                    if response.status_code != (refused if cell == REFUSED else 200):
                        wrong.append(f"{row}, {role} of {vo}: {response.status_code} {response.text[:200]}")
                    seen = marks_in(response.text)
                    if cell != "all" and not seen <= expected(cell, vo, set(MARKS.values())):  # type: ignore[arg-type]
                        wrong.append(f"{row}, {role} of {vo}: sees {seen}")
                    if cell == "own VO" and "schedules" not in path and "settings" not in path and not seen:
                        wrong.append(f"{row}, {role} of {vo}: does not see the own VO's")
                    other = next(each for each in VOS if each != vo)
                    if cell == "own VO" and re.search(rf"\b{other}\b", response.text):
                        wrong.append(f"{row}, {role} of {vo}: names {other}")
    assert not wrong, "\n".join(wrong)


async def dead_letter_ids(site: Site) -> dict[str, str]:
    """Mark -> task id of the dead letter in the database."""
    db = site.context.task_db
    assert db is not None
    async with db:
        return {mark: row["task_id"] for row in await db.search() for mark in marks_in(row["detail"])}


async def test_administrators_see_objects_of_each_vo_and_of_none(site: Site) -> None:
    async with site.user("administrator") as client:
        for path in ("queues/normal:large", "running", "delayed", "failures", "dead-letters", "locks"):
            response = await client.get(f"{API}/{path}")
            assert marks_in(response.text) == set(MARKS.values()), path
        response = await client.get(f"{API}/waiting-dead-letters")
        assert marks_in(response.text) == set(MARKS.values())
        for vo, mark in MARKS.items():
            response = await client.get(f"{API}/audit", params={} if vo is None else {"vo": vo})
            assert marks_in(response.text) == {mark}
            response = await client.get(f"{BELOW}/audit", params={} if vo is None else {"vo": vo})
            assert marks_in(response.text) == {mark}


async def test_an_object_of_another_vo_looks_like_an_unknown_one(site: Site) -> None:
    dead_letters = await dead_letter_ids(site)
    async with site.user("operator", "lhcb") as client:
        db = site.context.task_db
        assert db is not None
        async with db:
            numbers = {row["task_id"]: str(row["id"]) for row in await db.search()}
        assert (await client.get(f"{API}/dead-letters/{dead_letters[MARKS['lhcb']]}")).status_code == 200
        for below in (API, BELOW):
            for theirs in (dead_letters[MARKS["gridpp"]], dead_letters[MARKS[None]]):
                for key, invented in ((theirs, "f" * 32), (numbers[theirs], "987654")):
                    responses = [await client.get(f"{below}/dead-letters/{each}") for each in (key, invented)]
                    assert [response.status_code for response in responses] == [404, 404]
                    assert re.sub(rf"{key}|{invented}", "", responses[0].text) == re.sub(
                        rf"{key}|{invented}", "", responses[1].text
                    ).replace(invented, key)
        for path in ("audit", "configuration/settings"):
            responses = [await client.get(f"{API}/{path}", params={"vo": vo}) for vo in ("gridpp", "nowhere")]
            assert [response.status_code for response in responses] == [404, 404]
            assert responses[0].text.replace("gridpp", "nowhere") == responses[1].text
        for path in ("audit", "schedules"):
            responses = [await client.get(f"{BELOW}/{path}", params={"vo": vo}) for vo in ("gridpp", "nowhere")]
            assert [response.status_code for response in responses] == [404, 404]
            assert responses[0].text.replace("gridpp", "nowhere") == responses[1].text


def actions(table: list[Row]) -> Iterator[Row]:
    return (row for row in table if row.method == "POST" and "sign" not in row.path)


BODIES: dict[str, Any] = {
    "/cancel": {"task_ids": ["0" * 32]},
    "/queues/{queue}/purge": None,
    "/locks/release": {"key": "lock:mutex:job:none"},
    "/schedules/pause": {"ids": ["whose:None"]},
    "/schedules/resume": {"ids": ["whose:None"]},
    "/schedules/run-now": {"schedule_id": "whose:None"},
    "/dead-letters/retry": {"ids": [987654]},
    "/dead-letters/discard": {"ids": [987654]},
}


async def test_each_role_writes_by_http_as_in_the_table(site: Site) -> None:
    for role in ("anonymous", *ROLES):
        async with site.user(role) as client:
            for row in actions(ROUTES):
                path = addresses(row, queue="normal:medium")
                # What is refused is not even looked at: a wrong body makes no difference.
                for body in (BODIES[row.path], {"invalid": 1}):
                    response = await client.post(f"{API}{path}", json=body)
                    if row.cells[role] == "all":
                        assert response.status_code in (200, 404, 409, 422), f"{row}, {role}: {response.text}"
                    else:
                        assert response.status_code == (401 if role == "anonymous" else 403), f"{row}, {role}"
    entries = await read_audit(site.context.redis)
    assert {entry.who for entry in entries if entry.target != MARKS[None]} == {"fred (lhcb:nobody)"}


async def test_each_role_reads_in_the_dashboard_as_in_the_table(site: Site) -> None:
    lock = f"lock:mutex:{SITE}:{MARKS[None]}"
    [group] = await monitor.groups(site.context.redis)
    dead_letters = await dead_letter_ids(site)
    wrong = []
    for role in ("anonymous", *ROLES):
        for vo in VOS:
            async with site.user(role, vo) as client:
                for row in PAGES:
                    if row.method != "GET" or row.cells[role] == "anyone":
                        continue
                    key = dead_letters[MARKS[vo]]
                    path = addresses(row, queue="normal:large", group=group.group_id, dead_letter=key)
                    params = {"key": lock} if "locks/one" in path else {}
                    cell = row.cells[role]
                    signed_in = role not in ("anonymous", "user")
                    refused = 403 if signed_in else 303
                    page = await client.get(f"{BELOW}{path}", params=params)
                    if page.status_code != (refused if cell == REFUSED else 200):
                        wrong.append(f"{row}, {role} of {vo}: {page.status_code} {page.text[:200]}")
                    stream = await client.get(f"{BELOW}/live{path}", params=params)
                    if stream.status_code not in (page.status_code, 303 if refused == 303 else 404):
                        wrong.append(f"live {row}, {role} of {vo}: {stream.status_code}")
                    for response in (page, stream):
                        seen = marks_in(response.text)
                        if cell != "all" and not seen <= expected(cell, vo, set(MARKS.values())):  # type: ignore[arg-type]
                            wrong.append(f"{response.url}, {role} of {vo}: sees {seen}")
                    if cell == "own VO" and path != "/schedules" and not marks_in(page.text):
                        wrong.append(f"{row}, {role} of {vo}: does not see the own VO's")
                    other = next(each for each in VOS if each != vo)
                    if cell == "own VO" and re.search(rf"\b{other}\b", page.text + stream.text):
                        wrong.append(f"{row}, {role} of {vo}: names {other}")
    assert not wrong, "\n".join(wrong)


async def test_public_responses_contain_no_data_of_vos(site: Site) -> None:
    async with site.user("anonymous") as client:
        for row in PAGES:
            if row.method == "GET" and row.cells["anonymous"] == "anyone":
                response = await client.get(f"{BELOW}{row.path}")
                assert not re.search(rf"\b({'|'.join(VOS)})\b", response.text) or row.path == "/sign-in", row
                assert not marks_in(response.text), row


async def test_each_role_writes_in_the_dashboard_as_in_the_table(site: Site) -> None:
    for role in ("anonymous", *ROLES):
        async with site.user(role) as client:
            page = await client.get(f"{BELOW}/queues")
            form = re.search(r'name="form_token" value="(\w+)"', page.text)
            assert (form is not None) == (role in ("operator", "administrator"))
            fields = {"form_token": form[1] if form else "", "confirmed": "yes"}
            for row in actions(PAGES):
                response = await client.post(f"{BELOW}{row.path}", data=fields)
                if row.cells[role] == "all":
                    assert response.status_code == 303, f"{row}, {role}: {response.text}"
                else:
                    assert response.status_code == (403 if form else 401), f"{row}, {role}"
