"""`gubbins pilots reconcile`, `list --job` and `show`, with DiracX's pilot registry beside the database."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from diracx.db.sql import PilotAgentsDB
from diracx.db.sql.pilots.schema import JobToPilotMapping, PilotAgents
from diracx.tasks.operations.audit import read_audit
from redis.asyncio import Redis
from sqlalchemy import delete, insert, select, update
from support.warm_commands import WarmCommands

from gubbins.db.sql import MyPilotDB
from gubbins.logic import my_pilots as logic

Run = Callable[..., Any]


@pytest.fixture
def run(sqlite_url: str, warm_commands: WarmCommands, tmp_path: Any) -> Run:
    """`await run("show", "1", registry=None)`: one of the commands about pilots."""

    async def _run(*args: str, registry: str | None = f"sqlite+aiosqlite:///{tmp_path}/registry.db") -> Any:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DIRACX_")}
        environment["DIRACX_DB_URL_MYPILOTDB"] = sqlite_url
        if registry is not None:
            environment["DIRACX_DB_URL_PILOTAGENTSDB"] = registry
        environment |= {name: value for name, value in os.environ.items() if name == "DIRACX_TASKS_REDIS_URL"}
        command = ["gubbins", "pilots", *args]
        return await asyncio.to_thread(warm_commands.run, command, env=environment, typed="", timeout=60)

    return _run


def refused(done: subprocess.CompletedProcess[str], *fragments: str) -> None:
    """Said on stderr in one line, and nothing on stdout."""
    assert (done.returncode, done.stdout) == (1, ""), done
    (line,) = done.stderr.splitlines()
    assert line.startswith("gubbins: ")
    for fragment in fragments:
        assert fragment in line


@pytest.fixture
async def pilots(sqlite_db: MyPilotDB, sqlite_registry: PilotAgentsDB) -> list[dict[str, Any]]:
    """Three registered pilots, two of lhcb and one of dteam."""
    await sqlite_db.add_ce("ce", 9, 1.0)
    for number, vo in enumerate(("lhcb", "lhcb", "dteam")):
        pilot_id = await sqlite_db.submit_pilot("ce", vo)
        await sqlite_db.confirm_pilots([(pilot_id, f"job {number}")])
        await logic.update_registry(sqlite_db, sqlite_registry, vo)
    return sorted((await sqlite_db.search_pilots(vo=None))[1], key=lambda pilot: pilot["pilot_id"])


async def change(registry: PilotAgentsDB, *statements: Any) -> None:
    async with registry.engine.begin() as connection:
        for statement in statements:
            await connection.execute(statement)


async def damage(registry: PilotAgentsDB, pilots: list[dict[str, Any]]) -> None:
    """One is missing, one has another status, and one is unknown to us; of the latter one has ended."""
    stamp = PilotAgents.pilot_stamp
    foreign = {"VO": "lhcb", "DestinationSite": "ce", "GridType": "SLURM"}
    await change(
        registry,
        delete(PilotAgents).where(stamp == pilots[0]["stamp"]),
        update(PilotAgents).where(stamp == pilots[2]["stamp"]).values(Status="Done"),
        insert(PilotAgents).values(PilotStamp="foreign", Status="Running", **foreign),
        insert(PilotAgents).values(PilotStamp="past", Status="Done", **foreign),
        insert(PilotAgents).values(PilotStamp="elsewhere", Status="Running", VO="lhcb", DestinationSite="other"),
    )


async def test_differences_are_shown_and_corrected(
    run: Run, pilots: list[dict[str, Any]], sqlite_registry: PilotAgentsDB
) -> None:
    assert (await run("reconcile")).returncode == 0
    await damage(sqlite_registry, pilots)
    shown = await run("reconcile")
    assert shown.returncode == 1
    assert "3 pilots compared: 1 are not in the registry, 1 have another status there, 1 are only" in shown.stdout
    for stamp in (pilots[0]["stamp"], pilots[2]["stamp"], "foreign"):
        assert stamp in shown.stdout
    assert "elsewhere" not in shown.stdout
    found = json.loads((await run("reconcile", "--json", "--vo", "lhcb")).stdout)
    assert (found["missing"], found["different"], found["unknown"], found["mended"]) == (1, 0, 1, 0)
    assert found["differences"][0] | {"registry_id": None} == {
        "stamp": pilots[0]["stamp"],
        "vo": "lhcb",
        "ce_name": "ce",
        "pilot_id": 1,
        "status": "Waiting",
        "registry_id": None,
        "registry_status": None,
    }
    mended = await run("reconcile", "--apply", "--json")
    assert mended.returncode == 1, "one is left that is unknown here"
    assert "not written to the audit log" in mended.stderr
    assert json.loads(mended.stdout)["remaining"] == 1
    async with sqlite_registry.engine.begin() as connection:
        rows = await connection.execute(select(PilotAgents.pilot_stamp, PilotAgents.status))
        now = {row[0]: row[1] for row in rows}
    assert now == {each["stamp"]: "Waiting" for each in pilots} | {
        "foreign": "Running",
        "past": "Done",
        "elsewhere": "Running",
    }
    await change(sqlite_registry, delete(PilotAgents).where(PilotAgents.pilot_stamp == "foreign"))
    assert (await run("reconcile")).returncode == 0


async def test_corrections_are_in_the_audit_log(
    run: Run,
    pilots: list[dict[str, Any]],
    sqlite_registry: PilotAgentsDB,
    redis: Redis,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DIRACX_TASKS_REDIS_URL", redis_url)
    await change(sqlite_registry, delete(PilotAgents))
    assert (await run("reconcile", "--fix", "--vo", "lhcb")).returncode == 0
    [entry] = await read_audit(redis)
    assert (entry.action, entry.target, entry.outcome) == (
        "reconcile pilots",
        "lhcb",
        "2 corrected, 0 differences left",
    )
    assert (await run("reconcile", "--vo", "dteam")).returncode == 1


async def test_jobs_of_a_pilot_and_pilots_of_a_job(
    run: Run, pilots: list[dict[str, Any]], sqlite_registry: PilotAgentsDB
) -> None:
    ran = [{"PilotID": pilots[1]["registry_id"], "JobID": job, "StartTime": datetime.now(UTC)} for job in (5, 6)]
    await change(sqlite_registry, insert(JobToPilotMapping).values(ran))
    assert json.loads((await run("show", "2", "--json")).stdout)["jobs"] == [6, 5]
    assert json.loads((await run("show", "1", "--json")).stdout)["jobs"] == []
    assert "6, 5" in (await run("show", "2")).stdout
    found = json.loads((await run("list", "--job", "5", "--json")).stdout)
    assert [pilot["pilot_id"] for pilot in found["items"]] == [2]
    assert json.loads((await run("list", "--job", "5", "--vo", "dteam", "--json")).stdout)["items"] == []


@pytest.mark.usefixtures("pilots")
async def test_a_missing_registry_is_an_error_of_one_line(run: Run, tmp_path: Any) -> None:
    refused(await run("reconcile", registry=None), "no pilot registry is configured: set DIRACX_DB_URL_PILOT")
    refused(await run("list", "--job", "5", registry=None), "no pilot registry is configured")
    away = f"sqlite+aiosqlite:///{tmp_path}/nowhere/registry.db"
    refused(await run("reconcile", registry=away), "the file of the database PilotAgentsDB cannot be opened")
    refused(await run("list", "--job", "5", registry=away), "the file of the database PilotAgentsDB")
    refused(await run("reconcile", registry="mysql+aiomysql://root@127.0.0.1:1/x"), "PilotAgentsDB")
    for registry in (None, away):  # it is shown all the same
        shown = await run("show", "1", "--json", registry=registry)
        assert (shown.returncode, json.loads(shown.stdout)["jobs"]) == (0, None)
