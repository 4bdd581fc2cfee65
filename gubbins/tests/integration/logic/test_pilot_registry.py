"""Synchronization with DiracX's pilot registry, `PilotAgentsDB`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from diracx.db.sql import PilotAgentsDB
from diracx.db.sql.pilots.schema import PilotAgents
from diracx.tasks.testing import TaskSystem
from sqlalchemy import delete, event, insert, select, text

from gubbins.ces import Observation, Observed
from gubbins.ces.registry import available_backends, load_backend
from gubbins.db import registry as there
from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.schema import Pilots
from gubbins.domain.pilot_states import MyPilotStatus as S
from gubbins.logic import my_pilots as logic
from gubbins.logic.my_pilots.registry import PILOTS_PER_UPDATE
from gubbins.tasks.my_pilots import MyCheckPilotsTask

LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)
Entries = dict[str, dict[str, Any]]


async def entries(registry: PilotAgentsDB) -> list[dict[str, Any]]:
    async with registry.engine.begin() as connection:
        rows = await connection.execute(select(PilotAgents.__table__).order_by(PilotAgents.pilot_id))
        return [dict(row) for row in rows.mappings()]


async def by_stamp(registry: PilotAgentsDB) -> Entries:
    """Entries of the registry by stamp; no pilot is there twice."""
    found = await entries(registry)
    assert len({row["PilotStamp"] for row in found}) == len(found)
    return {row["PilotStamp"]: row for row in found}


async def submit(db: MyPilotDB, vo: str = "lhcb", ce: str = "ce", reference: str | None = None) -> tuple[int, str]:
    pilot_id = await db.submit_pilot(ce, vo)
    if reference is not None:
        await db.confirm_pilots([(pilot_id, reference)])
    return pilot_id, (await db.get_pilot(pilot_id))["stamp"]


async def move(db: MyPilotDB, pilot_id: int, *path: S, reason: str | None = None) -> None:
    for status in path:
        await db.update_pilot_status(pilot_id, status, reason=reason)


async def statuses(registry: PilotAgentsDB) -> set[str]:
    return {row["Status"] for row in (await by_stamp(registry)).values()}


@contextlib.contextmanager
def sent_to(*engines: Any) -> Iterator[list[str]]:
    """Statements sent to these databases."""
    sent: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        sent.append(statement)

    for engine in engines:
        event.listen(engine.sync_engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        for engine in engines:
            event.remove(engine.sync_engine, "before_cursor_execute", note)


async def test_each_state_maps_to_a_status_of_dirac(db: MyPilotDB, registry: PilotAgentsDB) -> None:
    await db.add_ce("ce", 20, 1.0)
    expected = {}
    for name, path, reference in (
        ("Submitted", (), None),
        ("Waiting", (), "job 1"),
        ("Running", (S.RUNNING,), "job 2"),
        ("Done", (S.RUNNING, S.DONE), "job 3"),
        ("Failed", (S.RUNNING, S.FAILED), "job 4"),
        ("Aborted", (S.RUNNING, S.FAILED), "job 5"),
    ):
        pilot_id, stamp = await submit(db, reference=reference)
        if name == "Aborted":
            await db.request_cancels([(pilot_id, "cancelled by fred")])
        await move(db, pilot_id, *path, reason="exit code 1" if name == "Failed" else None)
        expected[stamp] = (name, reference or stamp)
    assert await logic.update_registry(db, registry, "lhcb") == 6
    found = await by_stamp(registry)
    assert {stamp: (row["Status"], row["PilotJobReference"]) for stamp, row in found.items()} == expected
    reasons = {row["Status"]: row["StatusReason"] for row in found.values()}
    assert (reasons["Failed"], reasons["Aborted"], reasons["Done"]) == ("exit code 1", "cancelled by fred", "")
    assert await logic.update_registry(db, registry, "lhcb") == 0


async def test_a_pilot_is_registered_with_its_vo_grid_type_site_and_queue(
    db: MyPilotDB, registry: PilotAgentsDB
) -> None:
    slurm = {"directory": "/shared", "partition": "grid"}
    await db.add_ce("slurm.example.org", 9, 1.0, backend="slurm", settings=slurm, rules={"site": "LCG.Here.org"})
    await db.add_ce("plain", 9, 1.0)
    rules = {"queue": "long", "grid_ce": "arc.example.org"}
    await db.add_ce("arc.example.org:long", 9, 1.0, backend="uninstalled", rules=rules)
    stamps = [(await submit(db, vo, ce))[1] for vo, ce in (("lhcb", "slurm.example.org"), ("lhcb", "plain"))]
    stamps += [(await submit(db, "dteam", "arc.example.org:long"))[1]]
    for vo in ("lhcb", "dteam"):
        await logic.update_registry(db, registry, vo)
    found = await by_stamp(registry)
    columns = ("VO", "GridType", "GridSite", "DestinationSite", "Queue")
    assert [tuple(found[stamp][column] for column in columns) for stamp in stamps] == [
        ("lhcb", "SLURM", "LCG.Here.org", "slurm.example.org", "grid"),
        ("lhcb", "simulated", "Unknown", "plain", "Unknown"),
        ("dteam", "uninstalled", "Unknown", "arc.example.org", "long"),
    ]
    submitted = (await db.get_pilot(1))["submitted_at"]
    assert abs(found[stamps[0]]["SubmissionTime"] - submitted) < timedelta(seconds=1)


def test_back_ends_have_grid_types_of_dirac() -> None:
    names = {"slurm": "SLURM", "ssh": "SSH", "arc": "AREX", "htcondor": "HTCondorCE", "local": "Local"}
    assert {name: load_backend(name).grid_type_of({}) for name in names} == names
    assert {*available_backends()} == {*names, "batch", "simulated"}
    systems = {"gridengine": "GE", "pbs": "Torque", "torque": "Torque", "lsf": "LSF"}
    assert {system: load_backend("batch").grid_type_of({"system": system}) for system in systems} == systems
    queues = {"slurm": "partition", "arc": "queue", "batch": "queue"}
    assert {name: load_backend(name).queue_setting for name in queues} == queues
    for name, setting in queues.items():
        assert setting in load_backend(name).Settings.model_fields


async def test_the_check_keeps_the_registry_up_to_date(
    db: MyPilotDB, registry: PilotAgentsDB, scripted: Any
) -> None:
    await db.add_ce("ce", 9, 1.0, backend="scripted")
    await submit(db)
    check = MyCheckPilotsTask("lhcb")
    for seen, status, reason in (
        (Observation(Observed.WAITING, "Priority", "job 7"), "Waiting", "Priority"),
        (Observation(Observed.WAITING, "Resources"), "Waiting", "Resources"),
        (Observation(Observed.WAITING, None), "Waiting", ""),
        (Observation(Observed.RUNNING), "Running", ""),
        (Observation(Observed.FAILED, "exit code 9"), "Failed", "exit code 9"),
    ):
        scripted.observations["ce"] = seen
        await check.execute(my_pilot_db=db, pilot_registry=registry)
        [row] = (await by_stamp(registry)).values()
        assert (row["Status"], row["StatusReason"], row["PilotJobReference"]) == (status, reason, "job 7")


@pytest.mark.parametrize("configured", [True, False])
async def test_the_check_gets_the_registry_if_configured(
    sqlite_db: MyPilotDB, sqlite_registry: PilotAgentsDB, configured: bool
) -> None:
    await sqlite_db.add_ce("ce", 9, 1.0)
    await submit(sqlite_db)
    overrides: dict[Any, Any] = {MyPilotDB.no_transaction: lambda: sqlite_db}
    if configured:
        overrides[PilotAgentsDB.no_transaction] = lambda: sqlite_registry
    async with TaskSystem([MyCheckPilotsTask], overrides=overrides, task_db_url=None) as system:
        done = await system.result(await MyCheckPilotsTask("lhcb").schedule(), timeout=30)
    assert done.return_value == {"RUNNING": 1}
    assert await statuses(sqlite_registry) == ({"Running"} if configured else set())


async def test_long_and_hostile_text_is_truncated_to_the_columns_of_the_registry(
    db: MyPilotDB, registry: PilotAgentsDB
) -> None:
    await db.add_ce("ce", 9, 1.0)
    pilot_id, _ = await submit(db, reference="r" * 255)
    await db.set_waiting_reasons([(pilot_id, "\0ü🚀" * 300)])
    await logic.update_registry(db, registry, "lhcb")
    [row] = (await by_stamp(registry)).values()
    assert len(row["StatusReason"]) == 255
    assert row["StatusReason"].startswith("\\x00\\xfc\\U0001f680")


async def test_without_a_registry_a_check_sends_no_additional_statements(
    db: MyPilotDB, registry: PilotAgentsDB
) -> None:
    await db.add_ce("ce", 9, 1.0)
    await submit(db)
    with sent_to(db.engine) as sent:
        await MyCheckPilotsTask("lhcb").execute(my_pilot_db=db)
    assert sent
    assert not [statement for statement in sent if "Regist" in statement]
    with sent_to(db.engine) as sent:
        await MyCheckPilotsTask("lhcb").execute(my_pilot_db=db, pilot_registry=registry)
    assert [statement for statement in sent if "Regist" in statement]


class KilledError(BaseException):
    """Simulates the death of the worker."""


@contextlib.contextmanager
def killed_at(step: int, *engines: Any) -> Iterator[None]:
    """The process dies before the statement of that number, or before that commit."""
    left = step

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KilledError

    for engine in engines:
        event.listen(engine.sync_engine, "before_cursor_execute", count)
        event.listen(engine.sync_engine, "commit", count)
    try:
        yield
    finally:
        for engine in engines:
            event.remove(engine.sync_engine, "before_cursor_execute", count)
            event.remove(engine.sync_engine, "commit", count)


async def test_no_crash_registers_a_pilot_twice(db: MyPilotDB, registry: PilotAgentsDB) -> None:
    await db.add_ce("ce", 500, 1.0)
    died = 0
    # The statements are the same on each kind of database: of the servers, each third is enough.
    every = 1 if db.engine.dialect.name == "sqlite" else 3
    for step in range(1, 100, every):
        new, old = await submit(db), await submit(db, reference=f"job {step}")
        undone = await submit(db)
        await logic.update_registry(db, registry, "lhcb")
        await db.release_pilots([undone[0]])
        await db.confirm_pilots([(new[0], f"new job {step}")])
        await move(db, old[0], S.RUNNING)
        newer = await submit(db, reference=f"newer job {step}")
        try:
            with killed_at(step, db.engine, registry.engine):
                await logic.update_registry(db, registry, "lhcb")
        except KilledError:
            died += 1
        else:
            break
        await logic.update_registry(db, registry, "lhcb")
        found = await by_stamp(registry)
        of_pilots = [(found[stamp]["Status"], found[stamp]["PilotJobReference"]) for _, stamp in (new, old, newer)]
        assert of_pilots == [
            ("Waiting", f"new job {step}"),
            ("Running", f"job {step}"),
            ("Waiting", f"newer job {step}"),
        ], f"killed at step {step}"
        assert found[undone[1]]["Status"] == "Aborted", f"killed at step {step}"
        assert await db.unwritten_registrations(vo="lhcb", limit=9) == []
    assert died > 15 // every


@pytest.fixture
def both_insert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two checks have both found a pilot missing before either registers it."""
    insert_entries, met = there.insert_entries, asyncio.Barrier(2)

    async def meet_and_insert(registry: PilotAgentsDB, rows: Any) -> None:
        await met.wait()
        await insert_entries(registry, rows)

    monkeypatch.setattr(there, "insert_entries", meet_and_insert)


@pytest.mark.usefixtures("both_insert")
async def test_of_two_concurrent_registrations_the_later_one_is_deleted(
    db: MyPilotDB, db_url: str, registry: PilotAgentsDB
) -> None:
    await db.add_ce("ce", 500, 1.0)
    stamps = [(await submit(db, reference=f"job {n}"))[1] for n in range(20)]
    await asyncio.gather(*(logic.update_registry(db, registry, "lhcb") for _ in range(2)))
    await logic.update_registry(db, registry, "lhcb")
    found = await by_stamp(registry)
    assert found.keys() == set(stamps)
    assert {row["Status"] for row in found.values()} == {"Waiting"}
    for pilot in (await db.search_pilots(vo="lhcb"))[1]:
        assert pilot["registry_id"] == found[pilot["stamp"]]["PilotID"]


async def test_a_change_during_an_update_is_written_by_the_next_check(
    db: MyPilotDB, registry: PilotAgentsDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    await db.add_ce("ce", 9, 1.0)
    update_entries = there.update_entries
    waiting, started = await submit(db, reference="job 1"), await submit(db, reference="job 2")

    async def meanwhile(*args: Any, **kwargs: Any) -> None:
        monkeypatch.undo()
        await db.set_waiting_reasons([(waiting[0], "Resources")])
        await move(db, started[0], S.RUNNING)
        await logic.update_registry(db, registry, "lhcb")  # another check is faster, and this one comes late
        await update_entries(*args, **kwargs)

    monkeypatch.setattr(there, "update_entries", meanwhile)
    await logic.update_registry(db, registry, "lhcb")
    await logic.update_registry(db, registry, "lhcb")
    found = await by_stamp(registry)
    assert found[waiting[1]]["StatusReason"] == "Resources"
    assert found[started[1]]["Status"] == "Running"


async def test_a_released_submission_is_aborted_in_the_registry(db: MyPilotDB, registry: PilotAgentsDB) -> None:
    await db.add_ce("ce", 9, 1.0)
    pilot_id, stamp = await submit(db)
    await logic.update_registry(db, registry, "lhcb")
    await db.release_pilots([pilot_id])
    # On SQLite the next pilot gets the same id.
    _, other = await submit(db, reference="job 1")
    await logic.update_registry(db, registry, "lhcb")
    found = await by_stamp(registry)
    assert (found[stamp]["Status"], found[other]["Status"]) == ("Aborted", "Waiting")
    assert found[stamp]["StatusReason"] == "its submission was undone"
    assert await db.undone_registrations(9) == []


async def test_a_submission_released_during_its_registration_is_aborted_in_the_registry(
    db: MyPilotDB, registry: PilotAgentsDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    await db.add_ce("ce", 9, 1.0)
    pilot_id, stamp = await submit(db)
    insert_entries = there.insert_entries

    async def undone_meanwhile(*args: Any) -> None:
        await insert_entries(*args)
        await db.release_pilots([pilot_id])

    monkeypatch.setattr(there, "insert_entries", undone_meanwhile)
    await logic.update_registry(db, registry, "lhcb")
    await logic.update_registry(db, registry, "lhcb")
    assert (await by_stamp(registry))[stamp]["Status"] == "Aborted"


async def test_missing_entries_are_inserted_again(db: MyPilotDB, registry: PilotAgentsDB) -> None:
    await db.add_ce("ce", 9, 1.0)
    pilots = [await submit(db, reference=f"job {n}") for n in range(3)]
    undone, _ = await submit(db)
    await logic.update_registry(db, registry, "lhcb")
    await db.release_pilots([undone])
    # A backup was restored, and others have registered since, under ids that ours had; old entries have no stamp.
    foreign = {"PilotStamp": "", "VO": "dteam", "Status": "Done", "LastUpdateTime": LONG_AGO}
    async with registry.engine.begin() as connection:
        await connection.execute(delete(PilotAgents))
        await connection.execute(insert(PilotAgents), [foreign | {"PilotID": n + 1} for n in range(4)])
    untouched = await entries(registry)
    for pilot_id, _ in pilots:
        await move(db, pilot_id, S.RUNNING)
    await logic.update_registry(db, registry, "lhcb")
    found = await entries(registry)
    assert found[:4] == untouched
    assert {row["PilotStamp"]: row["Status"] for row in found[4:]} == {stamp: "Running" for _, stamp in pilots}


@pytest.mark.parametrize("vo", ["lhcb", "e\u0301 🚀"])
async def test_an_entry_that_only_the_registry_has_is_found_by_its_vo(
    db: MyPilotDB, registry: PilotAgentsDB, vo: str
) -> None:
    await db.add_ce("ce", 9, 1.0)
    pilot_id = await db.submit_pilot("ce", vo)
    await logic.update_registry(db, registry, vo)
    await db.release_pilots([pilot_id])
    assert (await logic.reconcile_registry(db, registry, vo)).unknown == 1
    assert (await logic.reconcile_registry(db, registry, "dteam")).unknown == 0


async def test_a_pilot_that_the_registry_refuses_does_not_stop_the_others(
    sqlite_db: MyPilotDB, sqlite_registry: PilotAgentsDB, caplog: pytest.LogCaptureFixture
) -> None:
    db, registry = sqlite_db, sqlite_registry
    await db.add_ce("ce", 30, 1.0)
    stamps = [(await submit(db))[1] for _ in range(21)]
    async with registry.engine.begin() as connection:
        await connection.execute(
            text(
                f"CREATE TRIGGER bad BEFORE INSERT ON PilotAgents WHEN NEW.PilotStamp = '{stamps[7]}' "
                "BEGIN SELECT RAISE(ABORT, 'not this one'); END"
            )
        )
    assert await logic.update_registry(db, registry, "lhcb") == 20
    assert (await by_stamp(registry)).keys() == {*stamps} - {stamps[7]}
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert stamps[7] in warning
    assert "not this one" in warning
    assert [row.stamp for row in await db.unwritten_registrations(vo="lhcb", limit=9)] == [stamps[7]]


async def test_an_unavailable_registry_is_one_warning_and_is_updated_later(
    sqlite_db: MyPilotDB,
    mariadb_server: Any,
    stoppable: Any,
    registry_at: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server, db = stoppable(mariadb_server), sqlite_db
    await db.add_ce("ce", 9, 1.0)
    async with registry_at(await server.create_database("")) as registry:
        await submit(db)
        check = MyCheckPilotsTask("lhcb")
        await logic.update_registry(db, registry, "lhcb")
        server.kill()
        caplog.clear()
        assert await check.execute(my_pilot_db=db, pilot_registry=registry) == {"RUNNING": 1}
        [warning] = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert "cannot reach the database PilotAgentsDB" in warning.getMessage()
        assert warning.exc_info is None
        server.start()
        await check.execute(my_pilot_db=db, pilot_registry=registry)
        assert await statuses(registry) == {"Done"}


async def test_an_unresponsive_registry_does_not_delay_checks(
    sqlite_db: MyPilotDB, caplog: pytest.LogCaptureFixture
) -> None:
    db = sqlite_db
    requested = asyncio.Event()

    async def silent(_reader: Any, writer: asyncio.StreamWriter) -> None:
        requested.set()
        with contextlib.suppress(ConnectionError):
            await _reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    hung = PilotAgentsDB(f"mysql+aiomysql://root@127.0.0.1:{port}/registry")
    await db.add_ce("ce", 9, 1.0)
    await submit(db)
    async with server, hung.engine_context():
        updating = asyncio.create_task(logic.update_registry(db, hung, "lhcb", seconds=4))
        await asyncio.wait_for(requested.wait(), 30)
        await submit(db)  # SQLite has one writer: no transaction of ours is open meanwhile
        assert not updating.done()
        assert await asyncio.wait_for(updating, 60) == 0
        server.close()
    assert "no response for 4 s" in caplog.text
    assert len(await db.unwritten_registrations(vo="lhcb", limit=9)) == 2


async def test_a_newly_configured_registry_is_filled_by_several_checks_newest_first(
    sqlite_db: MyPilotDB, sqlite_registry: PilotAgentsDB
) -> None:
    db, registry = sqlite_db, sqlite_registry
    await db.add_ce("ce", 9, 1.0)
    ended = {"vo": "lhcb", "ce_name": "ce", "status": S.DONE, "submitted_at": LONG_AGO, "ended_at": LONG_AGO}
    many = [ended | {"stamp": f"{n:032x}", "last_update": LONG_AGO} for n in range(PILOTS_PER_UPDATE + 200)]
    async with db:
        await db.conn.execute(insert(Pilots), many)
    _, newest = await submit(db, reference="job 1")
    assert await logic.update_registry(db, registry, "lhcb", seconds=120) == PILOTS_PER_UPDATE
    assert (await by_stamp(registry))[newest]["Status"] == "Waiting"
    assert await logic.update_registry(db, registry, "lhcb", seconds=120) == 201
    assert len(await by_stamp(registry)) == len(many) + 1
    # What has ended costs nothing any more.
    with sent_to(registry.engine) as sent, sent_to(db.engine) as ours:
        assert await logic.update_registry(db, registry, "lhcb") == 0
    assert sent == []
    assert len(ours) == 3
