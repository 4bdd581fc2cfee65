"""The default pilot script with a real CE and the real application."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.config_repository import ConfigRepository
from support.dashboard_browser import served
from support.diracx_application import set_environment
from support.pilot_waiters import alive
from support.waiting import until

from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.logic import my_pilots as logic

API = "/api/my_pilots"
ENDS = (MyPilotStatus.DONE, MyPilotStatus.FAILED)
CLIENTS = ["curl", "python3"]


@dataclass
class World:
    """A local CE whose pilots reach the application."""

    db: MyPilotDB
    directory: Path
    url: str

    async def add_ce(self, **how: Any) -> None:
        rules = how.pop("rules", {})
        # A pilot that is killed removes nothing: here it has all the time it needs.
        settings = {"directory": str(self.directory), "keep": "all", "kill_after_seconds": 50} | how
        await self.db.add_ce("ce", 10, 1.0, backend="local", settings=settings, rules=rules)

    async def until(self, pilot_id: int, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """The pilot, as soon as it is so, with checks as a worker makes them."""

        async def check() -> dict[str, Any] | None:
            pilot = await logic.get_pilot(self.db, pilot_id)
            if condition(pilot):
                return pilot
            await logic.transition_pilot_states(self.db, "lhcb")
            return None

        try:
            return dict(await until(check, "the pilot"))
        except AssertionError as error:
            output = [file.read_text() for file in self.directory.glob("*/std*")]
            raise AssertionError(f"{error}: {await logic.get_pilot(self.db, pilot_id)}, {output}") from None

    async def run(self) -> dict[str, Any]:
        """A pilot that has ended."""
        pilot_id = await logic.submit_pilot(self.db, "ce", "lhcb")
        return await self.until(pilot_id, lambda pilot: pilot["status"] in ENDS)

    def left(self) -> list[str]:
        """Names of files with tokens or secrets that are left in the directories of the pilots."""
        return [str(path) for path in self.directory.rglob(".pilot*")]


@asynccontextmanager
async def application(
    db_url: str, redis_url: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[str]:
    """The URL of its routes about pilots."""
    from diracx.core.config import ConfigSource
    from diracx.routers.factory import create_app

    set_environment(monkeypatch, directory, redis_url, ConfigRepository(directory / "config", vos=["lhcb"]).url)
    monkeypatch.setenv("DIRACX_DB_URL_MYPILOTDB", db_url)
    monkeypatch.setenv("DIRACX_SERVICE_MY_PILOTS_ENABLED", "true")
    app = create_app()
    app.dependency_overrides[ConfigSource.create].__self__.read()  # else the first response is 503
    with socket.create_server(("127.0.0.1", 0)) as listening:
        async with app.router.lifespan_context(app), served(app, listening):
            yield f"http://127.0.0.1:{listening.getsockname()[1]}{API}"


@pytest.fixture
async def world(
    sqlite_db: MyPilotDB, sqlite_url: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    async with application(sqlite_url, redis_url, tmp_path, monkeypatch) as url:
        monkeypatch.setenv("GUBBINS_PILOT_API_URL", url)
        yield World(sqlite_db, tmp_path / "pilots", url)


@pytest.fixture(params=CLIENTS, scope="module")
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """PATH of a node that has this program and not the other one."""
    [missing] = {*CLIENTS} - {request.param}
    commands: dict[str, str] = {}
    for directory in reversed(os.environ["PATH"].split(os.pathsep)):
        if Path(directory).is_dir():
            commands |= {name: f"{directory}/{name}" for name in os.listdir(directory)}
    there = tmp_path_factory.mktemp("bin")
    for name, command in commands.items():
        if not name.startswith((missing, "python")) or name == request.param:
            (there / name).symlink_to(command)
    return str(there)


async def test_a_pilot_without_work_has_this_outcome_in_its_history(world: World, path: str) -> None:
    await world.add_ce(environment={"PATH": path}, payloads={"lhcb": "exit 75"})
    pilot = await world.run()
    assert [step["status"] for step in pilot["history"]] == ["SUBMITTED", "RUNNING", "DONE"]
    _, running, done = pilot["history"]
    cores, host = len(os.sched_getaffinity(0)), socket.gethostname()
    assert running["reason"] == f"on {host}, {cores} cores, {pilot['memory_mb']} MB"
    assert pilot["memory_mb"] > 100
    assert done["reason"] == "reported by the pilot: no work, exit code 75"
    assert (pilot["outcome"], pilot["jobs_done"], pilot["exchanged_from"]) == ("no work", None, "127.0.0.1")
    assert world.left() == []


@pytest.mark.parametrize(
    ("payload", "status", "outcome", "jobs"),
    [
        (None, "DONE", "no work", None),
        ('echo 3 > "$PILOT_JOBS_FILE"', "DONE", "worked", 3),
        ('echo 007 > "$PILOT_JOBS_FILE"', "DONE", "worked", 7),
        ("exit 69", "FAILED", "node unfit", None),
        ("exit 7", "FAILED", "error", None),
        ("kill -9 $$", "FAILED", "error", None),
    ],
)
async def test_a_pilot_reports_its_outcome(
    world: World, payload: str | None, status: str, outcome: str, jobs: int | None
) -> None:
    await world.add_ce(payloads={"lhcb": payload} if payload else {})
    pilot = await world.run()
    assert (pilot["status"], pilot["outcome"], pilot["jobs_done"]) == (status, outcome, jobs)
    assert f"reported by the pilot: {outcome}" in pilot["history"][-1]["reason"]


async def test_a_payload_has_a_valid_token_and_no_secret(world: World, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    payload = f'(stat -c %a "$PILOT_TOKEN_FILE"; cat "$PILOT_TOKEN_FILE"; echo; env; ls -A) > {seen}; sleep 600'
    await world.add_ce(payloads={"lhcb": payload})
    pilot_id = await logic.submit_pilot(world.db, "ce", "lhcb")
    await world.until(pilot_id, lambda _: seen.exists() and "PILOT_STAMP" in seen.read_text())
    mode, token, *rest = seen.read_text().splitlines()
    assert (mode, token.count(".")) == ("600", 2)
    assert not [line for line in rest if "SECRET" in line or token in line or ".pilot-secret" in line]
    for path in _command_lines():
        with suppress(OSError):  # it has just ended
            assert token.encode() not in path.read_bytes()
    await logic.cancel_pilot(world.db, pilot_id, by="me")
    await world.until(pilot_id, lambda pilot: pilot["status"] in ENDS)


def _command_lines() -> list[Path]:
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if alive(int(path.parent.name))]


async def test_heartbeats_continue_with_renewed_tokens_and_end_with_the_pilot(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.add_ce(payloads={"lhcb": "sleep 600"}, rules={"heartbeat_seconds": 1, "stale_after_seconds": 30})
    # Less than the time that a pilot wants to have left: each heartbeat renews the token.
    monkeypatch.setenv("DIRACX_SERVICE_AUTH_ACCESS_TOKEN_EXPIRE_MINUTES", "1")
    pilot_id = await logic.submit_pilot(world.db, "ce", "lhcb")
    pilot = await world.until(pilot_id, lambda pilot: pilot["heartbeat_at"])
    for _ in range(3):
        before = pilot["heartbeat_at"]
        pilot = await world.until(pilot_id, lambda pilot, before=before: pilot["heartbeat_at"] > before)
    assert (pilot["status"], pilot["stale"]) == ("RUNNING", False)
    await logic.cancel_pilot(world.db, pilot_id, by="me")
    ended = await world.until(pilot_id, lambda pilot: pilot["status"] in ENDS)
    assert ended["history"][-1]["reason"].startswith("cancelled")
    assert world.left() == []


async def test_heartbeats_end_with_a_pilot_that_was_killed(world: World, tmp_path: Path) -> None:
    group = tmp_path / "group"
    rules = {"heartbeat_seconds": 1, "stale_after_seconds": 2}
    await world.add_ce(payloads={"lhcb": f"echo $PPID > {group}; kill -9 $PPID; sleep 600"}, rules=rules)
    pilot_id = await logic.submit_pilot(world.db, "ce", "lhcb")
    pilot = await world.until(pilot_id, lambda pilot: pilot["status"] in ENDS)
    assert (pilot["status"], pilot["outcome"]) == ("FAILED", None)
    assert not alive(int(group.read_text()))


async def test_a_pilot_runs_without_a_connection_to_the_api(
    world: World, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("GUBBINS_PILOT_API_URL", f"http://127.0.0.1:{port}{API}")
    await world.add_ce(environment={"PATH": path}, payloads={"lhcb": "echo worked"})
    pilot = await world.run()
    assert (pilot["status"], pilot["outcome"], pilot["heartbeat_at"]) == ("DONE", None, None)
    assert [step["reason"] for step in pilot["history"]] == [None] * 3
    assert (world.directory / pilot["stamp"] / "stdout").read_text() == "worked\n"
    assert (world.directory / pilot["stamp"] / "stderr").read_text() == ""


@pytest.mark.timeout(90)
async def test_an_unresponsive_network_delays_a_pilot_by_seconds_only(
    world: World, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """The pilot connects and gets no response."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("GUBBINS_PILOT_API_URL", f"http://127.0.0.1:{silent.getsockname()[1]}{API}")
        await world.add_ce(environment={"PATH": path}, payloads={"lhcb": "true"})
        begun = time.monotonic()
        pilot = await world.run()
    assert (pilot["status"], pilot["outcome"]) == ("DONE", None)
    assert time.monotonic() - begun < 45


async def test_without_an_identity_the_script_only_runs_the_payload(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GUBBINS_PILOT_API_URL")
    await world.add_ce()
    pilot = await world.run()
    assert (pilot["status"], pilot["outcome"], pilot["host"]) == ("DONE", None, None)
    assert world.left() == []
