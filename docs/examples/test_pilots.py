"""The pilot system from end to end: two VOs and one full compute element."""

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from diracx.core.config import ConfigSource
from diracx.tasks.testing import TaskSystem

from gubbins.db.sql import MyPilotDB
from gubbins.domain.exceptions import IllegalTransitionError
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.logic import my_pilots as logic
from gubbins.tasks.my_pilots import MyCheckPilotsTask, MyPilotTask, MySubmitPilotsTask

VOS = SimpleNamespace(registry={"lhcb": None, "gridpp": None})


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[MyPilotDB]:
    database = MyPilotDB(f"sqlite+aiosqlite:///{tmp_path}/pilots.db")
    async with database.engine_context():
        await database.create_tables()
        yield database


async def test_two_vos_fill_a_compute_element_and_no_more(db: MyPilotDB) -> None:
    await logic.add_ce(db, logic.CESpec(name="ce01", capacity=5), by_operator=True)
    overrides = {MyPilotDB.no_transaction: lambda: db, ConfigSource.create: lambda: VOS}
    tasks = [MySubmitPilotsTask, MyPilotTask, MyCheckPilotsTask]
    async with TaskSystem(tasks, workers=2, overrides=overrides) as system:
        for vo in VOS.registry:
            await MySubmitPilotsTask(vo).schedule()
        await system.drain()

        [ce] = await logic.list_ces(db)
        assert (ce["active"], ce["available_slots"]) == (5, 0)

        # One step at each check: SUBMITTED, RUNNING, DONE.
        for expected in ({"RUNNING"}, {"DONE"}):
            for vo in VOS.registry:
                await MyCheckPilotsTask(vo).schedule()
            await system.drain()
            summary = await logic.count_pilots(db)
            assert {state for ces in summary.values() for state in ces["ce01"]} == expected


async def test_there_is_no_way_back(db: MyPilotDB) -> None:
    await db.add_ce("ce01", 1, 1.0)
    pilot_id = await db.submit_pilot("ce01", vo="lhcb")
    with pytest.raises(IllegalTransitionError):
        await db.update_pilot_status(pilot_id, MyPilotStatus.DONE)
    assert (await db.get_pilot(pilot_id))["status"] == MyPilotStatus.SUBMITTED
