"""Repeated transactions count once."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError
from support.pilot_requests import request_pilots

from gubbins.ces import Observation, Observed, SubmitOutcome
from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.domain.exceptions import CERefusedError
from gubbins.logic import my_pilots as logic
from gubbins.logic.my_pilots import CESpec

STAMP = "5" * 32
_RULES = {"timeout_seconds": 5}


@contextlib.contextmanager
def each_commit_fails_once(db: MyPilotDB) -> Iterator[list[int]]:
    """Abort each transaction that has written once, as a busy file does. Yields the number of aborted ones."""
    engine, ended = db.engine.sync_engine, [0]
    written: dict[Any, bool] = {}
    spared = False

    def note(connection: Any, _cursor: Any, statement: str, *_: object) -> None:
        if not statement.startswith("SELECT"):
            written[connection.connection.dbapi_connection] = True

    def refuse(connection: Any) -> None:
        nonlocal spared
        if not written.pop(connection.connection.dbapi_connection, False):
            return
        spared = not spared
        if spared:
            ended[0] += 1
            busy = sqlite3.OperationalError("database is locked")
            busy.sqlite_errorcode = sqlite3.SQLITE_BUSY
            raise OperationalError("COMMIT", None, busy)

    event.listen(engine, "before_cursor_execute", note)
    event.listen(engine, "commit", refuse)
    try:
        yield ended
    finally:
        event.remove(engine, "before_cursor_execute", note)
        event.remove(engine, "commit", refuse)


async def _load(db: MyPilotDB, scripted: Any) -> Any:
    return await logic.load_ces(db, [CESpec(name="new", capacity=1), CESpec(name="ce", capacity=7)])


async def _add(db: MyPilotDB, scripted: Any) -> Any:
    return (await logic.add_ce(db, CESpec(name="new", capacity=1), by_operator=False))["name"]


async def _request(db: MyPilotDB, scripted: Any) -> Any:
    return await request_pilots(db, "lhcb", vos=["lhcb", "dteam"])


async def _submit(db: MyPilotDB, scripted: Any) -> Any:
    return await logic.submit_pilot(db, "ce", "lhcb", stamp=STAMP)


async def _submit_requested(db: MyPilotDB, scripted: Any) -> Any:
    stamps = (await db.add_requests("lhcb", {"ce": 2}))["ce"]
    return await logic.submit_requested_pilot(db, "ce", "lhcb", stamp=stamps[1])


async def _refused(db: MyPilotDB, scripted: Any) -> Any:
    scripted.submissions["ce"] = SubmitOutcome(None, "no")
    stamps = (await db.add_requests("lhcb", {"ce": 2}))["ce"]
    for stamp in stamps:
        with pytest.raises(CERefusedError):
            await logic.submit_requested_pilot(db, "ce", "lhcb", stamp=stamp)


async def _check(db: MyPilotDB, scripted: Any) -> Any:
    scripted.observations["ce"] = Observation(Observed.DONE, "done")
    return [await logic.transition_pilot_states(db, "lhcb") for _ in range(2)]


async def _fail(db: MyPilotDB, scripted: Any) -> Any:
    scripted.observations["ce"] = RuntimeError("no")
    return await logic.transition_pilot_states(db, "lhcb")


async def _cancel(db: MyPilotDB, scripted: Any) -> Any:
    pilot = await logic.cancel_pilot(db, 1, by="a test")
    return pilot["status"], scripted.cancelled == [pilot["stamp"]]


async def _prune(db: MyPilotDB, scripted: Any) -> Any:
    await db.update_pilot_status(1, MyPilotStatus.RUNNING)
    await db.update_pilot_status(1, MyPilotStatus.DONE)
    return await logic.prune_pilots(db, keep=timedelta(0))


async def _ban_and_open(db: MyPilotDB, scripted: Any) -> Any:
    return [await logic.ban_ce(db, "ce", reason="x"), await logic.set_ce_enabled(db, "ce", True)]


OPERATIONS = (
    *(_load, _add, _request, _submit, _submit_requested, _refused, _check, _fail, _cancel, _prune),
    _ban_and_open,
)


async def _rows(db: MyPilotDB) -> dict[str, list[tuple[Any, ...]]]:
    """Read all rows, without their times, and with ids as they are among each other."""
    found = {}
    async with db.engine.connect() as connection:
        for name, table in db.metadata.tables.items():
            columns = [
                column
                for column in table.columns
                if not isinstance(column.type, type(db.metadata.tables["Pilots"].c.submitted_at.type))
                and column.key not in ("stamp",)
            ]
            found[name] = sorted((tuple(row) for row in await connection.execute(select(*columns))), key=repr)
    return found


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_repeated_operation_counts_once(
    operation: Callable[[MyPilotDB, Any], Awaitable[Any]], scripted: Any, empty_database: Any
) -> None:
    outcomes = []
    for disturbed in (False, True):
        for known in (scripted.submissions, scripted.observations, scripted.cancellations):
            known.clear()
        scripted.cancelled.clear()
        scripted.submissions["ce"] = SubmitOutcome("reference")
        db = MyPilotDB(await empty_database("sqlite"))
        async with db.engine_context():
            await db.create_tables()
            await db.add_ce("ce", 5, 1.0, backend="scripted", rules=_RULES)
            await logic.submit_pilot(db, "ce", "lhcb")
            with each_commit_fails_once(db) if disturbed else contextlib.nullcontext([1]) as ended:
                returned = await operation(db, scripted)
            assert ended[0] > 0
            outcomes.append((returned, await _rows(db)))
    assert outcomes[0] == outcomes[1]
