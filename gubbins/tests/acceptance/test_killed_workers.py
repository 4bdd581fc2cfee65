"""Workers killed during a submission: no pilot is doubled or lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from support.distributions import install_distribution
from support.pilot_requests import request_pilots
from support.waiting import eventually, until
from support.warm_commands import Running, WarmCommands

from gubbins.ces.local import LocalBackend
from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.domain import clock
from gubbins.logic import my_pilots as logic

PROGRAM = "diracx-task-run"
DEADLINE_SECONDS = 60.0

# The back end `local`, that stands still before or after it has started the pilot, where a file says so.
STALLING = """
import asyncio
import os
from pathlib import Path

from gubbins.ces.local import LocalBackend


class StallingBackend(LocalBackend):
    async def submit(self, pilots):
        await self.stall("before")
        outcomes = await super().submit(pilots)
        await self.stall("after")
        return outcomes

    async def stall(self, moment):
        if os.environ.get("STALL") == moment:
            Path("stalled").touch()
            await asyncio.sleep(3600)
"""


class Site:
    """A compute element with one slot too many, and workers that submit to it."""

    def __init__(self, directory: Path, redis_url: str, db_url: str, commands: WarmCommands) -> None:
        self.directory = directory
        self._commands = commands
        self.runs = directory / "runs"
        install_distribution(directory, "stalling", STALLING, {"gubbins.ces": "stalling = StallingBackend"})
        path = os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])
        ours = {"DIRACX_TASKS_REDIS_URL": redis_url, "DIRACX_DB_URL_MYPILOTDB": db_url, "PYTHONPATH": path}
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("DIRACX_")} | ours
        self._workers: list[Running] = []

    def submit(self) -> None:
        command = [PROGRAM, "submit", "my_pilots:MyPilotTask", "--args", json.dumps(["ce", "lhcb"])]
        done = self._commands.run(command, env=self.environment, timeout=DEADLINE_SECONDS)
        assert done.returncode == 0, done.stderr

    def worker(self, stall: str) -> Running:
        with (self.directory / f"worker-{len(self._workers)}.log").open("wb") as log:
            process = self._commands.start(
                [PROGRAM, "worker", "--worker-size", "small", "--lease-seconds", "1"],
                cwd=self.directory,
                env=self.environment | {"STALL": stall},
                stdout=log,
                stderr=log,
            )
        self._workers.append(process)
        return process

    def kill_a_worker(self, moment: str) -> None:
        """Worker that has submitted the pilot (`after`) or was about to (`before`), without recording it."""
        self.submit()
        worker = self.worker(moment)
        eventually((self.directory / "stalled").exists, f"no submission: {self._said()}")
        worker.send_signal(signal.SIGKILL)
        worker.wait(DEADLINE_SECONDS)

    def pilots_run(self) -> int:
        return len(self.runs.read_text().splitlines()) if self.runs.exists() else 0

    def _said(self) -> str:
        return "\n".join(path.read_text() for path in self.directory.glob("worker-*.log"))

    def stop(self) -> None:
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            try:
                worker.wait(DEADLINE_SECONDS / 6)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


@pytest.fixture
async def db(sqlite_db: MyPilotDB, tmp_path: Path, install_backend: Any) -> MyPilotDB:
    install_backend("stalling", LocalBackend)
    settings = {"directory": str(tmp_path / "ce"), "default_script": f"echo $PILOT_STAMP >> {tmp_path}/runs"}
    await sqlite_db.add_ce("ce", 2, 1.0, backend="stalling", settings=settings)
    return sqlite_db


@pytest.fixture
def site(
    tmp_path: Path, redis_url: str, db: MyPilotDB, sqlite_url: str, warm_commands: WarmCommands
) -> Iterator[Site]:
    made = Site(tmp_path, redis_url, sqlite_url, warm_commands)
    yield made
    made.stop()
    with Redis.from_url(redis_url) as client:
        client.flushall()  # a worker that was killed leaves its traces


async def the_pilot(db: MyPilotDB) -> dict[str, Any]:
    total, (pilot,) = await db.search_pilots(vo=None)
    assert total == 1
    return pilot


async def check_until_done(db: MyPilotDB) -> None:
    async def done() -> bool:
        await logic.transition_pilot_states(db, "lhcb")
        return (await the_pilot(db))["status"] is MyPilotStatus.DONE

    await until(done)
    assert (await the_pilot(db))["reference"]


async def test_a_pilot_of_a_killed_worker_is_found_by_its_stamp(site: Site, db: MyPilotDB) -> None:
    site.kill_a_worker("after")
    orphan = await the_pilot(db)
    assert (orphan["status"], orphan["reference"]) == (MyPilotStatus.SUBMITTED, None)
    await check_until_done(db)
    assert (await the_pilot(db))["stamp"] == orphan["stamp"]
    assert site.runs.read_text().split() == [orphan["stamp"]]


async def test_a_pilot_that_never_reached_the_site_is_released_and_requested_again(
    site: Site, db: MyPilotDB
) -> None:
    site.kill_a_worker("before")
    assert (await the_pilot(db))["reference"] is None
    await logic.transition_pilot_states(db, "lhcb")
    assert (await the_pilot(db))["status"] is MyPilotStatus.SUBMITTED, "it may still be arriving"
    with clock.simulated(lambda: datetime.now(UTC) + timedelta(minutes=11)):
        await logic.transition_pilot_states(db, "lhcb")
        assert (await db.search_pilots(vo=None))[0] == 0
        assert await request_pilots(db, "lhcb", vos=["lhcb"]) == {"ce": 2}
    assert site.pilots_run() == 0


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_another_worker_resumes_the_submission_without_a_second_pilot(
    site: Site, db: MyPilotDB, moment: str
) -> None:
    site.kill_a_worker(moment)
    stamp = (await the_pilot(db))["stamp"]
    site.worker("never")

    async def resumed() -> bool:
        return (await the_pilot(db))["reference"] is not None

    await until(resumed)
    await check_until_done(db)
    assert (await the_pilot(db))["stamp"] == stamp
    assert site.runs.read_text().split() == [stamp]
