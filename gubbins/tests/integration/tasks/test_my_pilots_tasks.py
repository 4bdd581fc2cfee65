"""Pilot tasks: definitions of the seed, and execution with a real broker."""

from __future__ import annotations

import logging
import tomllib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from diracx.core.config import ConfigSource
from diracx.core.config.schema import Config
from diracx.tasks.plumbing import NoRetry
from diracx.tasks.plumbing.base_task import current_message
from diracx.tasks.plumbing.broker.models import TaskMessage
from diracx.tasks.plumbing.lock_registry import LockedObjectType
from diracx.tasks.testing import TaskSystem
from support.paths import ROOT

from gubbins.db.sql import MyPilotDB
from gubbins.domain import clock
from gubbins.domain.exceptions import CERefusedError, UnknownCEError
from gubbins.logic import my_pilots as logic
from gubbins.logic.my_pilots.demand import REQUEST_LIFETIME
from gubbins.tasks import my_pilots
from gubbins.tasks.my_pilot_lock_types import MY_PILOT
from gubbins.tasks.my_pilots import (
    MyCheckPilotsTask,
    MyCollectOutputsTask,
    MyPilotReportTask,
    MyPilotTask,
    MyPrunePilotsTask,
    MySubmitPilotsTask,
)

VOS = ("lhcb", "dteam", "gridpp")


@pytest.fixture
def config() -> Config:
    vo = {"IdP": {"URL": "https://idp.invalid", "ClientID": "x"}, "DefaultGroup": "user"}
    registry = {
        name: vo | {"Users": {}, "Groups": {"user": {"Properties": ["NormalUser"], "Users": []}}} for name in VOS
    }
    return Config.model_validate({"DIRAC": {}, "Operations": {}, "Registry": registry})


def test_tasks_are_as_defined_by_the_seed() -> None:
    assert MySubmitPilotsTask.default_schedule.seconds == 60
    assert MyCheckPilotsTask.default_schedule.seconds == 30
    assert MyCollectOutputsTask.default_schedule.seconds == 60
    assert MyPilotReportTask.default_schedule.expression == "0 * * * *"
    assert MyPrunePilotsTask.default_schedule.expression == "41 * * * *"
    assert isinstance(MyPilotTask.retry_policy, NoRetry)
    assert MyPilotTask.dlq_eligible is False
    assert MyPilotTask("ce", "lhcb").serialize() == ("ce", "lhcb")
    assert LockedObjectType("my_pilot") == MY_PILOT
    locks = [
        [lock.redis_key for lock in task.execution_locks]
        for task in (
            MyPilotTask("ce", "lhcb"),
            MySubmitPilotsTask("lhcb"),
            MyCheckPilotsTask("lhcb"),
            MyCollectOutputsTask("lhcb"),
            MyPilotReportTask(),
            MyPrunePilotsTask(),
        )
    ]
    assert locks == [
        ["lock:mutex:my_pilot:ce"],
        ["lock:mutex:task:MySubmitPilotsTask:lhcb"],
        ["lock:mutex:task:MyCheckPilotsTask:lhcb"],
        ["lock:mutex:task:MyCollectOutputsTask:lhcb"],
        ["lock:mutex:task:MyPilotReportTask"],
        ["lock:mutex:task:MyPrunePilotsTask"],
    ]


def test_each_task_is_an_entry_point() -> None:
    project = tomllib.loads((ROOT / "gubbins" / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["diracx.tasks.my_pilots"] == {
        name: f"gubbins.tasks.my_pilots:{name}" for name in my_pilots.__all__
    }


async def test_a_pilot_task_submits_one_pilot_of_its_vo(db: MyPilotDB) -> None:
    await db.add_ce("ce", 1, 1.0)
    pilot_id = await MyPilotTask("ce", "lhcb").execute(my_pilot_db=db)
    assert pilot_id is not None
    assert (await db.get_pilot(pilot_id))["vo"] == "lhcb"
    # A slot that was taken meanwhile is the ordinary course of things; a CE that is gone is not.
    assert await MyPilotTask("ce", "lhcb").execute(my_pilot_db=db) is None
    with pytest.raises(UnknownCEError):
        await MyPilotTask("gone", "lhcb").execute(my_pilot_db=db)


async def test_invalid_settings_are_a_refusal_and_the_last_error_of_the_ce(db: MyPilotDB) -> None:
    await db.add_ce("ce", 1, 1.0, backend="uninstalled")
    with pytest.raises(CERefusedError, match="uninstalled"):
        await MyPilotTask("ce", "lhcb").execute(my_pilot_db=db)
    assert "uninstalled" in (await db.get_ce("ce"))["last_error"]
    assert (await db.search_pilots(vo=None))[0] == 0


async def test_the_report_counts_everything(db: MyPilotDB, caplog: pytest.LogCaptureFixture) -> None:
    await db.add_ce("ce", 5, 1.0)
    for vo in VOS:
        await MyPilotTask("ce", vo).execute(my_pilot_db=db)
    await MyCheckPilotsTask("lhcb").execute(my_pilot_db=db)
    with caplog.at_level(logging.INFO, "gubbins.tasks.my_pilots"):
        summary = await MyPilotReportTask().execute(my_pilot_db=db)
    assert summary["lhcb"] == {"ce": {"RUNNING": 1}}
    assert "Pilots in all: 2 SUBMITTED, 1 RUNNING" in caplog.text


async def test_pilots_of_a_removed_vo_do_not_keep_their_slots_and_files(db: MyPilotDB, config: Config) -> None:
    """The scheduler has no checks for a VO that is not in the configuration."""
    await db.add_ce("ce", 1, 1.0)
    pilot_id = await MyPilotTask("ce", "removed").execute(my_pilot_db=db)
    assert pilot_id is not None
    tasks = [MyCheckPilotsTask, MyCollectOutputsTask, MyPilotReportTask]
    overrides: dict[Any, Any] = {
        MyPilotDB.no_transaction: lambda: db,
        ConfigSource.create: lambda: config,
    }
    async with TaskSystem(tasks, overrides=overrides, task_db_url=None) as system:
        for states in ({"SUBMITTED": 1}, {"RUNNING": 1}, {"DONE": 1}):
            if "DONE" in states:
                await db.queue_outputs([pilot_id])
            report = await system.result(await MyPilotReportTask().schedule(), timeout=30)
            assert report.return_value == {"removed": {"ce": states}}
            await system.drain(timeout=30)
    assert not await db.ces_with_queued_outputs(vo="removed")
    assert await MyPilotTask("ce", "lhcb").execute(my_pilot_db=db) is not None


async def test_requests_are_deleted_if_no_task_can_be_submitted(db: MyPilotDB, config: Config) -> None:
    for name in ("ce", "other"):
        await db.add_ce(name, 3, 1.0)
    for _ in range(2):  # no broker is bound here; the second round would find no room if the first had stayed
        with pytest.raises(RuntimeError, match="broker"):
            await MySubmitPilotsTask("lhcb").execute(my_pilot_db=db, config=config)
    for name in ("ce", "other"):
        assert not await db.waiting_requests(name, at_most=1)


def test_a_submit_task_can_be_limited_to_some_compute_elements() -> None:
    assert MySubmitPilotsTask("lhcb") == MySubmitPilotsTask(vo="lhcb", compute_elements=None, all_but=None)
    with pytest.raises(TypeError):
        MySubmitPilotsTask("lhcb", ["fast"])  # type: ignore[misc]
    with pytest.raises(ValueError, match="compute_elements and all_but exclude each other"):
        MySubmitPilotsTask("lhcb", compute_elements=["fast"], all_but=["fast"])


async def test_two_instances_submit_to_some_compute_elements_and_to_the_rest(
    db: MyPilotDB, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("fast", "slow", "slower"):
        await db.add_ce(name, 3, 1.0)
    tasks = [MySubmitPilotsTask, MyPilotTask]
    overrides: dict[Any, Any] = {
        MyPilotDB.no_transaction: lambda: db,
        ConfigSource.create: lambda: config,
    }
    async with TaskSystem(tasks, overrides=overrides, task_db_url=None) as system:

        async def asked(task: MySubmitPilotsTask) -> dict[str, int]:
            result = await system.result(await task.schedule(), timeout=30)
            assert not result.is_err, result.error
            await system.drain(timeout=30)
            return result.return_value

        assert await asked(MySubmitPilotsTask("lhcb", compute_elements=["fast", "unknown"])) == {"fast": 1}
        assert "Requests for lhcb name unknown compute elements: ['unknown']" in caplog.messages
        assert await asked(MySubmitPilotsTask("lhcb", compute_elements=[])) == {}
        assert await asked(MySubmitPilotsTask("lhcb", all_but=["fast"])) == {"slow": 1, "slower": 1}
        assert (await asked(MySubmitPilotsTask("dteam"))).keys() == {"fast", "slow", "slower"}
    assert set((await db.count_pilots())["lhcb"]) == {"fast", "slow", "slower"}


async def test_P60_P61_three_vos_fill_ces_and_follow_their_pilots(db: MyPilotDB, config: Config) -> None:
    await db.add_ce("reliable", 5, 1.0)
    await db.add_ce("hopeless", 4, 0.0, vos=["lhcb"])
    tasks = [MySubmitPilotsTask, MyPilotTask, MyCheckPilotsTask, MyPilotReportTask]
    overrides: dict[Any, Any] = {
        MyPilotDB.no_transaction: lambda: db,
        ConfigSource.create: lambda: config,
    }
    async with TaskSystem(tasks, workers=2, overrides=overrides, task_db_url=None) as system:

        async def run(*periodic: Any) -> list[Any]:
            ids = [await task.schedule() for task in periodic]
            results = [await system.result(task_id, timeout=30) for task_id in ids]
            await system.drain(timeout=30)
            return results

        for _ in range(3):
            await run(*(MySubmitPilotsTask(vo) for vo in VOS))
            for ce in await db.list_ces(vo=None):
                assert ce["active"] == ce["capacity"], "every slot is filled, and not one more"
            submitted = await db.count_pilots()
            # No VO was left out of the shared one.
            assert all("reliable" in submitted[vo] for vo in VOS)
            await run(*(MyCheckPilotsTask(vo) for vo in VOS))
            await run(*(MyCheckPilotsTask(vo) for vo in VOS))
        summary = await db.count_pilots()
    assert sum(summary[vo]["reliable"]["DONE"] for vo in VOS) == 15
    assert summary["lhcb"]["hopeless"] == {"FAILED": 12}
    assert all(set(states) == {"DONE"} for vo in VOS for ce, states in summary[vo].items() if ce == "reliable")


async def test_P60_requests_do_not_accumulate_while_workers_are_away(db: MyPilotDB, config: Config) -> None:
    await db.add_ce("ce", 4, 1.0)
    async with TaskSystem([MyPilotTask], workers=0, task_db_url=None):
        rounds = [await MySubmitPilotsTask(vo).execute(my_pilot_db=db, config=config) for vo in VOS * 3]
    assert sum(spawned.get("ce", 0) for spawned in rounds) == 4


@pytest.mark.parametrize("rules", [{"policy": "waiting_jobs"}, {"max_waiting": 10}], ids=lambda rules: str(*rules))
async def test_tasks_of_expired_requests_submit_nothing(
    db: MyPilotDB, config: Config, redis_url: str, monkeypatch: pytest.MonkeyPatch, rules: dict[str, Any]
) -> None:
    async def ten_jobs(*_: object) -> int:
        return 10

    monkeypatch.setattr(logic, "count_waiting_jobs", ten_jobs)
    await db.add_ce("ce", 100, 1.0, rules=rules)
    now = datetime(2026, 1, 1, tzinfo=UTC)
    tasks = [MyPilotTask]
    overrides: dict[Any, Any] = {MyPilotDB.no_transaction: lambda: db}
    with clock.simulated(lambda: now):
        async with TaskSystem(tasks, redis_url=redis_url, workers=0, task_db_url=None):
            for _ in range(3):
                now += REQUEST_LIFETIME + timedelta(seconds=1)
                spawned = await MySubmitPilotsTask("lhcb", compute_elements=["ce"]).execute(my_pilot_db=db)
                assert spawned == {"ce": 10}
            await MyPilotTask("ce", "lhcb").schedule()  # by hand
        async with TaskSystem(
            tasks, redis_url=redis_url, workers=1, overrides=overrides, task_db_url=None
        ) as system:
            await system.drain(timeout=60)
    submitted, requested = (await db.search_pilots(vo="lhcb"))[0], 0 if "max_waiting" in rules else 1
    assert submitted == 10 + requested, (
        "what the last round asked for, and the one by hand where the rules allow it"
    )


async def test_a_repeated_task_submits_the_request_of_its_first_execution(db: MyPilotDB) -> None:
    await db.add_ce("ce", 5, 1.0)
    [stamp] = (await db.add_requests("lhcb", {"ce": 1}))["ce"]
    seen = []
    for task_id, requested in (
        ("one", stamp),
        ("one", stamp),
        ("another", "expired"),
    ):
        labels = {my_pilots.LABEL_REQUESTED: requested}
        message = TaskMessage(task_id=task_id, task_name="my_pilots:MyPilotTask", labels=labels)
        token = current_message.set(message)
        try:
            seen.append(await MyPilotTask("ce", "lhcb").execute(my_pilot_db=db))
        finally:
            current_message.reset(token)
    assert seen[0] is not None
    assert seen == [seen[0], seen[0], None]
