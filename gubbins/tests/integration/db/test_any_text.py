"""Storage of any text in every database, and distinct names."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from diracx.tasks.plumbing.sql.migrations import MigrationError
from diracx.tasks.plumbing.sql.types import AnyLongText, AnyName, AnyText, sanitize, truncate
from sqlalchemy import Enum, String, insert
from support.hostile_text import NAMES, TEXTS

from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.db.sql.demand import Demand
from gubbins.db.sql.outputs import Output
from gubbins.db.sql.schema import MAX_REASON_CHARS, MAX_REFERENCE_CHARS, MAX_VO_CHARS, Pilots
from gubbins.domain.circuit_breaker import CECall

S = MyPilotStatus
#: No pilot is submitted for a VO with a longer one.
SHORT_NAMES = [name for name in NAMES if len(name) <= MAX_VO_CHARS]
NOW = datetime.now(tz=UTC)


@pytest.fixture
async def pilot_db(any_database: str) -> AsyncIterator[MyPilotDB]:
    db = MyPilotDB(any_database)
    async with db.engine_context():
        await db.create_tables()
        yield db


def test_every_text_column_takes_any_text() -> None:
    plain = [
        str(column)
        for table in MyPilotDB.metadata.tables.values()
        for column in table.columns
        if isinstance(column.type, String) and not isinstance(column.type, Enum | AnyName | AnyText | AnyLongText)
    ]
    assert sorted(plain) == [  # hexadecimal digits
        "PilotIdentities.FamilyHash",
        "PilotIdentities.RefreshHash",
        "PilotIdentities.SecretHashes",
        "PilotRequests.Stamp",
        "Pilots.Stamp",
        "UndoneRegistrations.Stamp",
    ]


async def test_reasons_and_errors_are_stored_unchanged(pilot_db: MyPilotDB) -> None:
    db = pilot_db
    await db.add_ce("ce", 100, 1.0)
    for text in TEXTS:
        kept = sanitize(text, MAX_REASON_CHARS)
        one, two, three = [await db.submit_pilot("ce", "lhcb") for _ in range(3)]
        await db.update_pilot_status(one, S.RUNNING, reason=text)
        await db.advance_pilots({S.RUNNING: [(two, text), (three, None)]}, vo="lhcb")
        await db.advance_pilots({S.FAILED: [(two, text)], S.DONE: [(three, text)]}, vo="lhcb")
        for pilot_id in (one, two, three):
            pilot = await db.get_pilot(pilot_id)
            assert pilot["last_error"] == pilot["history"][-1]["reason"] == kept
        await db.request_cancels([(one, text)])
        assert (await db.get_pilot(one))["last_error"] == kept
        await db.ban_ce("ce", reason=text)
        await db.record_failure("ce", CECall.STATUS, text, failures=9, pause_seconds=1, max_pause_seconds=1)
        ce = await db.get_ce("ce")
        assert ce["ban_reason"] == ce["last_error"] == ce["circuits"][CECall.STATUS]["last_error"] == kept
        await db.set_ce_enabled("ce", True)
        await db.queue_outputs([two, three])
        await db.store_outputs([Output(two, NOW, text, text), Output(three, NOW, error=text)])
        output, none = await db.get_output(two), await db.get_output(three)
        assert output is not None
        assert none is not None
        assert output["stdout"] == output["stderr"] == text.encode("utf-8", "replace").decode()
        assert none["error"] == kept


async def test_settings_are_stored_unchanged(pilot_db: MyPilotDB) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in TEXTS]
    written = {text: [text] for text in texts}
    await pilot_db.add_ce("ce", 1, 1.0, settings=written, vos=texts, rules=written)
    ce = await pilot_db.get_ce("ce")
    assert (ce["settings"], ce["vos"], ce["rules"]) == (written, texts, written)


async def test_references_are_stored_unchanged(pilot_db: MyPilotDB) -> None:
    await pilot_db.add_ce("ce", 100, 1.0)
    references = [name for name in NAMES if truncate(name, MAX_REFERENCE_CHARS) == name]
    for some in ([references[0]], references[1:]):  # one alone goes another way
        pilots = [(await pilot_db.submit_pilot("ce", "lhcb"), reference) for reference in some]
        assert await pilot_db.confirm_pilots(pilots) == len(pilots)
        for pilot_id, reference in pilots:
            assert (await pilot_db.get_pilot(pilot_id))["reference"] == reference


async def test_similar_names_of_vos_and_compute_elements_are_distinguished(pilot_db: MyPilotDB) -> None:
    db = pilot_db
    pilots, requested = {}, {}
    for name in SHORT_NAMES:
        await db.add_ce(name, 1, 1.0)
        pilots[name] = await db.submit_pilot(name, vo=name)
        requested[name] = (await db.add_requests(name, {name: 1}))[name]
        await db.replace_demand(name, {name: Demand(1, NOW, None)})
        await db.record_failure(name, CECall.SUBMIT, name, failures=1, pause_seconds=1, max_pause_seconds=1)
    kept = {truncate(name, 128) for name in SHORT_NAMES}
    assert len(kept) == len(SHORT_NAMES)
    both = {(name, name) for name in kept}
    assert {ce["name"] for ce in await db.list_ces()} == kept
    assert set(await db.get_demand()) == set(await db.count_slots()) == both
    assert set(await db.pending_requests(since=NOW - timedelta(days=1))) == both
    assert {vo: list(by_ce) for vo, by_ce in (await db.count_pilots()).items()} == {n: [n] for n in kept}
    for name, pilot_id in pilots.items():
        assert [row.pilot_id for row in await db.get_active_pilots(vo=name)] == [pilot_id]
        total, [found] = await db.search_pilots(vo=name, ce_name=name)
        assert (total, found["vo"], found["ce_name"]) == (1, truncate(name, 128), truncate(name, 128))
        assert (await db.get_ce(name))["circuits"][CECall.SUBMIT]["failures"] == 1
        assert await db.waiting_requests(name, at_most=9) == [(requested[name][0], truncate(name, 128))]
        assert await db.delete_requests(name, requested[name]) == 1


async def test_long_reasons_of_many_pilots_fit_the_packets_of_the_server(
    mariadb_server: Any, empty_database: Any
) -> None:
    db = MyPilotDB(await empty_database("mariadb"))
    reason, number = "🚀" * MAX_REASON_CHARS, 1500  # 21 MB in one statement, of which the server takes 16
    async with db.engine_context():
        await db.create_tables()
        await db.add_ce("ce", number, 1.0)
        pilot = {"vo": "lhcb", "ce_name": "ce", "submitted_at": NOW, "last_update": NOW}
        async with db:
            await db.conn.execute(insert(Pilots), [{**pilot, "stamp": f"{n:032x}"} for n in range(number)])
        moves = {S.RUNNING: [(row.pilot_id, reason) for row in await db.get_active_pilots(vo="lhcb")]}
        assert await db.advance_pilots(moves, vo="lhcb") == {S.RUNNING: number}
        assert (await db.get_pilot(moves[S.RUNNING][-1][0]))["last_error"] == reason


async def test_a_postgresql_database_with_a_limited_encoding_is_refused(
    empty_database: Any, postgresql_server: Any
) -> None:
    url = await empty_database("postgresql", "ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(MigrationError, match="LATIN1"):
        await MyPilotDB.migrations.upgrade(url)
    db = MyPilotDB(url)
    async with db.engine_context():
        with pytest.raises(MigrationError, match="ENCODING 'UTF8'"):
            await db.create_tables()
