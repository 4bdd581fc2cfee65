"""Frequent queries read no more rows than needed, with many pilots of which few are active.

The servers explain how they would execute the very statements that the database class sends.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, cast

import pytest
from sqlalchemy import Table, case, insert, literal, null, select, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import CreateIndex, DropIndex
from support.query_plans import Reading, plans

from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.db.sql.outputs import Output
from gubbins.db.sql.schema import ComputeElements, PilotHistory, PilotOutputs, Pilots
from gubbins.logic import my_pilots as logic

PILOTS = 50_000
CES, VOS = 200, 10
#: Each tenth is active; of the others each fifth has failed.
STATUS = "CASE WHEN n % 10 = 0 THEN CASE WHEN n % 20 = 0 THEN 'RUNNING' ELSE 'SUBMITTED' END "
STATUS += "WHEN n % 5 = 1 THEN 'FAILED' ELSE 'DONE' END"
#: All but each 5,000th are in the pilot registry as they are.
REGISTERED = "CASE WHEN n % 5000 = 0 THEN NULL WHEN n % 10 = 0 THEN CASE WHEN n % 20 = 0 THEN 'Running' "
REGISTERED += "ELSE 'Submitted' END WHEN n % 5 = 1 THEN 'Failed' ELSE 'Done' END"
NUMBERS = {
    "sqlite": "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {rows}) ",
    "postgresql": "WITH numbers(n) AS (SELECT generate_series(1, {rows})) ",
    "mysql": "",
}
INSERT = """INSERT INTO {Pilots} ({PilotID}, {VO}, {CEName}, {Status}, {Stamp}, {SubmittedAt},
    {EndedAt}, {LastUpdate}, {RegistryID}, {Registered})
{numbers} SELECT n, {vo}, {ce}, {status}, {stamp}, {at}, CASE WHEN n % 10 = 0 THEN NULL ELSE {at} END, {at}, n,
    {registered}
FROM {source}"""
NOW = datetime.now(UTC)
#: When the last pilot came; a tenth of all came not long before.
LAST = NOW - timedelta(days=1) + timedelta(seconds=PILOTS / 3)
LATELY = LAST - timedelta(seconds=PILOTS / 30)
pilots, outputs = cast(Table, Pilots.__table__), cast(Table, PilotOutputs.__table__)


def _fill(dialect: str, quote: Callable[[str], str]) -> str:
    """A statement that makes the pilots, the oldest first, three a second."""
    begin = f"{NOW - timedelta(days=1):%Y-%m-%d %H:%M:%S}"
    at = {
        "sqlite": f"strftime('%Y-%m-%d %H:%M:%f000', datetime('{begin}', (n / 3) || ' seconds'))",
        "postgresql": f"TIMESTAMP '{begin}' + n / 3 * INTERVAL '1 second'",
        "mysql": f"TIMESTAMP '{begin}' + INTERVAL n DIV 3 SECOND",
    }[dialect]

    def joined(prefix: str, number: str) -> str:
        return f"CONCAT('{prefix}', {number})" if dialect == "mysql" else f"'{prefix}' || ({number})"

    columns = ("Pilots", "PilotID", "VO", "CEName", "Status", "Stamp", "SubmittedAt", "EndedAt", "LastUpdate")
    columns += ("RegistryID", "Registered")
    statement = INSERT.format(
        **{name: quote(name) for name in columns},
        numbers=NUMBERS[dialect].format(rows=PILOTS),
        source=f"(SELECT seq AS n FROM seq_1_to_{PILOTS}) AS numbers" if dialect == "mysql" else "numbers",
        vo=joined("vo", f"(n * 7 + {'n DIV 10' if dialect == 'mysql' else 'n / 10'}) % {VOS}"),
        ce=joined("ce", f"(n * 13 + {'n DIV 10' if dialect == 'mysql' else 'n / 10'}) % {CES}"),
        stamp=joined("stamp", "n"),
        status=STATUS,
        registered=REGISTERED,
        at=at,
    )
    return statement.replace("%", "%%") if dialect == "mysql" else statement


#: So many rows are not checked one by one.
TRUSTING = {
    "sqlite": ("PRAGMA foreign_keys=OFF", "PRAGMA foreign_keys=ON"),
    "postgresql": ("SET session_replication_role = replica", "RESET session_replication_role"),
    "mysql": ("SET foreign_key_checks = 0, unique_checks = 0", "SET foreign_key_checks = 1, unique_checks = 1"),
}
STATISTICS = {
    "sqlite": "ANALYZE",
    "postgresql": "VACUUM ANALYZE",
    "mysql": "ANALYZE TABLE Pilots, PilotHistory, ComputeElements, PilotRequests, PilotOutputs",
}


@pytest.fixture
async def many(db: MyPilotDB) -> MyPilotDB:
    """50,000 pilots of 10 VOs at 200 compute elements, a tenth of them active, with current statistics.

    The output of each third that ended is kept; that of each 97th is still to be fetched.
    """
    now = datetime.now(UTC)
    ce = {"capacity": 100, "success_rate": 1.0, "created_at": now, "updated_at": now}
    rules = {"ce9": {"max_waiting": PILOTS, "max_per_cycle": PILOTS}}
    names = [f"ce{n}" for n in range(CES)]
    async with db:
        await db.conn.execute(
            insert(ComputeElements), [{"name": name, "rules": rules.get(name)} | ce for name in names]
        )
        for number in range(20):
            await db.add_requests("vo1", {f"ce{number}": 50})
    dialect = db.engine.dialect.name.replace("mariadb", "mysql")
    async with db.engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        begin, end = TRUSTING[dialect]
        await connection.execute(text(begin))
        await _load(connection, dialect)
        await connection.execute(text(end))
        await connection.execute(text(STATISTICS[dialect]))
    return db


async def _load(connection: AsyncConnection, dialect: str) -> None:
    # It is quicker to sort an index once than to find the place of each row.
    indexes = [*pilots.indexes, *outputs.indexes]
    for index in indexes:
        await connection.execute(DropIndex(index))
    await connection.exec_driver_sql(_fill(dialect, connection.dialect.identifier_preparer.quote))
    begun = select(Pilots.id, literal("SUBMITTED"), Pilots.submitted_at)
    await connection.execute(insert(PilotHistory).from_select(["pilot_id", "status", "at"], begun))
    queued = Pilots.id % 97 == 1
    fetched = case((queued, null()), else_=Pilots.ended_at)
    expires = case((queued, null()), (Pilots.id % 99 == 0, NOW), else_=NOW + timedelta(days=1))
    written = select(Pilots.id, Pilots.vo, Pilots.ce_name, fetched, expires)
    await connection.execute(
        insert(PilotOutputs).from_select(
            ["pilot_id", "vo", "ce_name", "fetched_at", "expires_at"],
            written.where(Pilots.ended_at.is_not(None), (Pilots.id % 3 == 0) | queued),
        )
    )
    for index in indexes:
        await connection.execute(CreateIndex(index))
    if dialect == "postgresql":
        await connection.execute(text(f"SELECT setval('\"Pilots_PilotID_seq\"', {PILOTS})"))


def wholes(readings: list[Reading]) -> list[str]:
    """Statements that read all pilots, or the history or output of all."""
    return [
        f"{each.how}: {each.statement}"
        for each in readings
        if each.whole and each.table.casefold() in ("pilots", "pilothistory", "pilotoutputs")
    ]


HOT: dict[str, Callable[[MyPilotDB], Awaitable[Any]]] = {
    "submit": lambda db: db.submit_pilot("ce7", "vo1"),
    "submit where rules limit it": lambda db: db.submit_pilot("ce9", "vo1"),
    "the active pilots of a VO": lambda db: db.get_active_pilots(vo="vo1"),
    "list compute elements": lambda db: db.list_ces(vo=None),
    "request": lambda db: logic.request_pilots(db, "vo1", vos=[f"vo{n}" for n in range(VOS)]),
    "one pilot": lambda db: db.get_pilot(1000),
    "a page of a VO": lambda db: db.search_pilots(vo="vo1"),
    "a page of a compute element": lambda db: db.search_pilots(vo=None, ce_name="ce1"),
    "what ended lately": lambda db: db.count_ended_pilots(LATELY, vo=None),
    "what ended lately, of a VO": lambda db: db.count_ended_pilots(LATELY, vo="vo1"),
    "the course of things": lambda db: db.count_steps(LATELY, LAST, vo=None),
    "the course of things, of a VO": lambda db: db.count_steps(LATELY, LAST, vo="vo1"),
    "summary of a VO": lambda db: db.count_pilots("vo1"),
    "cancel": lambda db: db.request_cancels([(1000, "x")]),
    "step": lambda db: db.update_pilot_status(1020 - 10, MyPilotStatus.RUNNING),
    "one output": lambda db: db.get_output(1002),
    "where output is queued": lambda db: db.ces_with_queued_outputs(vo="vo1"),
    "queued output": lambda db: db.queued_outputs(vo="vo1", ce_name="ce95", limit=500),
    "store output": lambda db: db.store_outputs([Output(389, NOW, "out", "err")]),
    "prune output": lambda db: db.prune_outputs(),
    "pilots of a job": lambda db: db.search_pilots(vo="vo1", stamps=["stamp1000", "stamp1001"]),
    "what is owed to the registry": lambda db: db.unwritten_registrations(vo="vo0", limit=5_000),
    "a page of all registrations": lambda db: db.registrations(vo=None, after=1_000, limit=500),
    "a page of the registrations of a VO": lambda db: db.registrations(vo="vo1", after=1_000, limit=500),
    "output that is owed to the registry": lambda db: db.unwritten_outputs(vo="vo1", limit=20),
    "prune": lambda db: db.delete_ended_pilots(ended_before=NOW - timedelta(hours=20), limit=500),
}


async def _write_down(db: MyPilotDB, number: int) -> None:
    """Write the results of a check of that many pilots, of which most are of other VOs."""
    ids = range(PILOTS - 10 * number, PILOTS, 10)
    await db.advance_pilots({MyPilotStatus.RUNNING: [(id, None) for id in ids]}, vo="vo1")
    await db.confirm_pilots([(id, "x") for id in ids])
    await db.set_pilots_missing(ids, NOW)
    await db.queue_outputs(ids)
    await db.release_pilots(ids[: number // 2])


async def _write_to_registry(db: MyPilotDB) -> None:
    pilots = await db.registrations(vo=None, after=PILOTS - 600, limit=500)
    stamps = {pilot.stamp for pilot in pilots}
    names = {pilot.ce_name for pilot in pilots}
    await db.set_registry_ids({pilot.stamp: pilot.pilot_id for pilot in pilots}, ce_names=names, submitted=stamps)
    await db.mark_registered(pilots)


HOT["what is written to the registry"] = _write_to_registry
for _number in (50, 2_000):
    HOT[f"what a check of {_number} pilots writes"] = partial(_write_down, number=_number)
HOT["a check of all pilots of a VO"] = lambda db: logic.transition_pilot_states(db, "vo3")


@pytest.mark.timeout(400)
async def test_frequent_statements_read_only_the_rows_they_need(many: MyPilotDB) -> None:
    await _check_what_is_owed_to_the_registry(many)
    problems = {}
    for name, ask in HOT.items():
        async with plans(many.engine) as readings:
            await ask(many)
        assert readings, name
        if found := wholes(readings):
            problems[name] = found
    assert not problems


async def _check_what_is_owed_to_the_registry(db: MyPilotDB) -> None:
    """Pilots to be registered are found without reading ended ones."""
    async with plans(db.engine) as readings:
        owed = await db.unwritten_registrations(vo="vo0", limit=5_000)
    assert 0 < len(owed) <= PILOTS / 5_000
    of_pilots = [each for each in readings if each.table.casefold() == "pilots"]
    assert len(of_pilots) == 2
    for each in of_pilots:  # a tenth of those of the VO is active
        rows = re.search(r"(\d+) rows", each.how)
        few = "idx_pilots_vo_registered" in each.how if rows is None else int(rows[1]) < PILOTS / VOS / 5
        assert few, each
