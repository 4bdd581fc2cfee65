"""Promises of the database layer on every kind of server."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

import pytest
from diracx.db.sql.utils import SQLDBUnavailableError
from diracx.tasks.plumbing.sql.errors import DatabaseError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from support.waiting import until
from support.warm_commands import WarmCommands

from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.domain.exceptions import (
    CEDisabledError,
    CEExistsError,
    IllegalTransitionError,
    NoRoomError,
    PilotNotFoundError,
    PilotSubmissionError,
    UnknownCEError,
    VONotServedError,
)

S = MyPilotStatus


async def test_compute_element_round_trip(db: MyPilotDB) -> None:
    await db.add_ce("ce", 5, 0.25, backend="local", settings={"keep": "all"}, vos=["lhcb"])
    ce = await db.get_ce("ce")
    assert (ce["capacity"], ce["success_rate"], ce["enabled"]) == (5, 0.25, True)
    assert (ce["backend"], ce["settings"], ce["vos"]) == ("local", {"keep": "all"}, ["lhcb"])
    assert ce["created_at"].tzinfo is not None
    assert await db.get_ce_success_rate("ce") == 0.25
    with pytest.raises(CEExistsError):
        await db.add_ce("ce", 1, 1.0)
    with pytest.raises(UnknownCEError):
        await db.get_ce("other")


@pytest.mark.parametrize(("capacity", "rate"), [(-1, 0.5), (1, -0.1), (1, 1.1)])
async def test_out_of_range_is_refused(db: MyPilotDB, capacity: int, rate: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        await db.add_ce("ce", capacity, rate)
    assert await db.list_ces(vo=None) == []


async def test_set_ce_is_idempotent_and_keeps_a_closed_ce_closed(db: MyPilotDB) -> None:
    assert await db.set_ce("ce", capacity=1, success_rate=1.0) == "created"
    assert await db.set_ce("ce", capacity=1, success_rate=1.0) == "unchanged"
    assert await db.set_ce_enabled("ce", False)
    assert not await db.set_ce_enabled("ce", False)
    assert await db.set_ce("ce", capacity=2, success_rate=1.0) == "updated"
    assert (await db.get_ce("ce"))["enabled"] is False
    assert await db.set_ce("ce", capacity=2, success_rate=1.0, enabled=True) == "updated"


async def test_available_ces_have_room_are_open_and_serve_the_vo(db: MyPilotDB) -> None:
    await db.add_ce("all", 2, 1.0)
    await db.add_ce("closed", 2, 1.0, enabled=False)
    await db.add_ce("full", 0, 1.0)
    await db.add_ce("theirs", 2, 1.0, vos=["dteam"])
    await db.submit_pilot("all", vo="dteam")
    available = await db.get_available_ces("lhcb")
    assert [(ce["name"], ce["available_slots"]) for ce in available] == [("all", 1)]


async def test_P60_a_refused_submission_has_a_reason_and_creates_nothing(db: MyPilotDB) -> None:
    await db.add_ce("closed", 2, 1.0, enabled=False)
    await db.add_ce("full", 1, 1.0)
    await db.add_ce("theirs", 2, 1.0, vos=["dteam"])
    await db.submit_pilot("full", vo="lhcb")
    for name, error in {
        "closed": CEDisabledError,
        "full": NoRoomError,
        "theirs": VONotServedError,
        "nowhere": UnknownCEError,
    }.items():
        with pytest.raises(error) as caught:
            await db.submit_pilot(name, vo="lhcb")
        assert isinstance(caught.value, PilotSubmissionError)
        assert name in str(caught.value)
    assert await db.count_pilots() == {"lhcb": {"full": {"SUBMITTED": 1}}}


async def test_P60_ended_pilots_free_their_slots(db: MyPilotDB) -> None:
    await db.add_ce("ce", 1, 1.0)
    pilot_id = await db.submit_pilot("ce", vo="lhcb")
    await db.update_pilot_status(pilot_id, S.RUNNING)
    with pytest.raises(NoRoomError):
        await db.submit_pilot("ce", vo="lhcb")
    await db.update_pilot_status(pilot_id, S.FAILED)
    await db.submit_pilot("ce", vo="lhcb")


# Processes of their own, forked before they have a database: several connections at once in each. They say that
# they are ready, begin when their input ends, and tell how many pilots they got.
_SUBMITTERS = """
import asyncio, os, sys
from gubbins.db.sql import MyPilotDB
from gubbins.domain.exceptions import NoRoomError

async def main(url, vo):
    db = MyPilotDB(url)
    async def one():
        try:
            await db.submit_pilot("ce", vo=vo)
        except NoRoomError:
            return 0
        return 1
    async with db.engine_context():
        os.write(1, b"ready\\n")
        sys.stdin.read()
        got = sum([sum(await asyncio.gather(*(one() for _ in range(4)))) for _ in range(3)])
        os.write(1, b"%d\\n" % got)

for number in range(5):
    if os.fork() == 0:
        asyncio.run(main(sys.argv[1], f"vo{number % 3}"))
        os._exit(0)
for _ in range(5):
    os.wait()
"""


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Both ends: to read, and to write."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "wb") as writer:
        yield reader, writer


async def test_P60_capacity_holds_against_many_processes(
    db: MyPilotDB, tables_url: str, tmp_path: Path, warm_commands: WarmCommands
) -> None:
    await db.add_ce("ce", 25, 1.0)
    script = tmp_path / "submitters.py"
    script.write_text(_SUBMITTERS)
    with _pipe() as (stdin, begin), _pipe() as (responses, stdout), os.fdopen(os.dup(2), "wb") as stderr:
        command = [str(script), tables_url]
        processes = warm_commands.start(command, env=os.environ, stdin=stdin, stdout=stdout, stderr=stderr)
        stdin.close()
        stdout.close()
        async with asyncio.timeout(120):
            for _ in range(5):
                assert await asyncio.to_thread(responses.readline) == b"ready\n"
            begin.close()
            counts = [int(line) for line in await asyncio.to_thread(responses.readlines)]
        assert processes.wait(60) == 0
    total, _ = await db.search_pilots(vo=None)
    assert len(counts) == 5
    assert sum(counts) == total == 25


async def test_P61_only_the_three_transitions_are_possible(db: MyPilotDB) -> None:
    await db.add_ce("ce", 100, 1.0)
    legal = {(S.SUBMITTED, S.RUNNING), (S.RUNNING, S.DONE), (S.RUNNING, S.FAILED)}
    for current, target in itertools.product(S, S):
        pilot_id = await db.submit_pilot("ce", vo="lhcb")
        if current is not S.SUBMITTED:
            await db.update_pilot_status(pilot_id, S.RUNNING)
        if current in (S.DONE, S.FAILED):
            await db.update_pilot_status(pilot_id, current)
        before = await db.get_pilot(pilot_id)
        if (current, target) in legal:
            assert await db.update_pilot_status(pilot_id, target, reason="because") == current
            after = await db.get_pilot(pilot_id)
            assert after["status"] == target
            assert after["history"][-1]["reason"] == after["last_error"] == "because"
        else:
            with pytest.raises(IllegalTransitionError, match=f"is {current} and cannot become {target}"):
                await db.update_pilot_status(pilot_id, target)
            assert await db.get_pilot(pilot_id) == before


async def test_P61_bulk_moves_only_legal_steps_of_own_pilots(db: MyPilotDB) -> None:
    await db.add_ce("ce", 10, 1.0)
    mine = [await db.submit_pilot("ce", vo="lhcb") for _ in range(3)]
    theirs = await db.submit_pilot("ce", vo="dteam")
    moves = {S.RUNNING: [(id, None) for id in (*mine, theirs)], S.DONE: [(mine[0], None)]}
    assert await db.advance_pilots(moves, vo="lhcb") == {S.RUNNING: 3, S.DONE: 0}
    assert (await db.get_pilot(theirs))["status"] is S.SUBMITTED
    # One that is no longer where we thought is left out, and no history is written twice.
    await db.update_pilot_status(mine[0], S.DONE)
    moves = {S.FAILED: [(mine[0], "exit 1"), (mine[1], "exit 2"), (mine[2], None)]}
    assert await db.advance_pilots(moves, vo="lhcb") == {S.FAILED: 2}
    done, failed, silent = [await db.get_pilot(id) for id in mine]
    assert [step["status"] for step in done["history"]] == [S.SUBMITTED, S.RUNNING, S.DONE]
    assert (failed["status"], failed["last_error"], failed["history"][-1]["reason"]) == (
        S.FAILED,
        "exit 2",
        "exit 2",
    )
    assert silent["last_error"] is None
    assert failed["submitted_at"] <= failed["started_at"] <= failed["ended_at"] == failed["last_update"]
    assert failed["ended_at"].utcoffset() == timedelta(0)


async def test_rollback_of_the_callers_transaction_undoes_everything(db: MyPilotDB) -> None:
    await db.add_ce("ce", 10, 1.0)

    async def fail_after_submitting() -> None:
        async with db:
            await db.submit_pilot("ce", vo="lhcb")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await fail_after_submitting()
    assert await db.count_pilots() == {}
    async with db:
        await db.submit_pilot("ce", vo="lhcb")
    assert await db.count_pilots() == {"lhcb": {"ce": {"SUBMITTED": 1}}}


async def test_only_unconfirmed_reservations_can_be_released(db: MyPilotDB) -> None:
    await db.add_ce("ce", 10, 1.0)
    reserved, confirmed, running = [await db.submit_pilot("ce", vo="lhcb") for _ in range(3)]
    await db.confirm_pilots([(confirmed, "job.1")])
    await db.update_pilot_status(running, S.RUNNING)
    assert await db.release_pilots([reserved, confirmed, running]) == 1
    with pytest.raises(PilotNotFoundError):
        await db.get_pilot(reserved)
    assert (await db.get_pilot(confirmed))["reference"] == "job.1"


async def test_search_is_paged_and_filtered(db: MyPilotDB) -> None:
    await db.add_ce("a", 10, 1.0)
    await db.add_ce("b", 10, 1.0)
    ids = [await db.submit_pilot("ab"[i % 2], vo=("lhcb", "dteam")[i // 4]) for i in range(6)]
    await db.update_pilot_status(ids[0], S.RUNNING)
    total, page = await db.search_pilots(vo="lhcb", page=2, per_page=3)
    assert (total, [pilot["pilot_id"] for pilot in page]) == (4, [ids[0]])
    assert (await db.search_pilots(vo=None, ce_name="a", status=S.SUBMITTED))[0] == 2
    assert [p["pilot_id"] for p in await db.get_pilots_by_status(S.RUNNING, vo="lhcb")] == [ids[0]]
    assert await db.get_pilots_by_status(S.RUNNING, vo="dteam") == []
    assert await db.count_pilots("dteam") == {"dteam": {"a": {"SUBMITTED": 1}, "b": {"SUBMITTED": 1}}}


async def test_requests_are_counted_deleted_refused_and_expire(db: MyPilotDB) -> None:
    first, second, third = (await db.add_requests("lhcb", {"ce": 3}))["ce"]
    [other] = (await db.add_requests("dteam", {"ce": 1}))["ce"]
    assert await db.delete_requests("ce", [first]) == 1
    assert await db.delete_requests("ce", [first, other]) == 1
    [last] = (await db.add_requests("dteam", {"ce": 1}))["ce"]
    await db.refuse_requests("ce", {first: ("lhcb", "no"), other: ("dteam", "no")})
    assert await db.waiting_requests("ce", at_most=9) == [(second, "lhcb"), (third, "lhcb"), (last, "dteam")]
    assert await db.waiting_requests("ce", vo="lhcb", at_most=1) == [(second, "lhcb")]
    assert await db.waiting_requests("other", at_most=9) == []
    assert [await db.find_submission(stamp) for stamp in (first, second, "none")] == [
        (None, False, "no"),
        (None, False, None),
        None,
    ]
    now = datetime.now(tz=UTC)
    pending = await db.pending_requests(since=now - timedelta(minutes=1))
    assert pending == {("ce", "lhcb"): 2, ("ce", "dteam"): 1}
    assert await db.pending_requests(since=now + timedelta(minutes=1)) == {}


async def test_concurrent_submissions_each_delete_their_request(db: MyPilotDB) -> None:
    now = datetime.now(tz=UTC)
    names, vos = ("a", "b"), ("lhcb", "dteam")
    stamps = {}
    for name in names:
        await db.add_ce(name, 100, 1.0)
        for vo in vos:
            stamps[name, vo] = iter((await db.add_requests(vo, {name: 25}))[name])

    async def ask(vo: str) -> None:
        for _ in range(5):
            async with db:
                await db.pending_requests(since=now - timedelta(minutes=1))
                for name in names:
                    await db.add_requests(vo, {name: 1})

    async def start(name: str, vo: str) -> None:
        for _ in range(5):
            assert await db.delete_requests(name, [next(stamps[name, vo])]) == 1

    starts = [start(name, vo) for _ in range(5) for name in names for vo in vos]
    await asyncio.gather(*(asyncio.create_task(one) for one in [*starts, *(ask(vo) for vo in vos)]))
    left = await db.pending_requests(since=now - timedelta(minutes=1))
    assert left == {(name, vo): 5 for name in names for vo in vos}


async def test_an_empty_database_is_an_error_with_the_command_to_initialise_it(db_url: str) -> None:
    db = MyPilotDB(db_url)
    async with db.engine_context():
        with pytest.raises(DatabaseError, match="gubbins db init"):
            await db.list_ces(vo=None)
        assert await db.create_tables()
        assert not await db.create_tables()
        assert await db.list_ces(vo=None) == []


async def test_P60_capacity_holds_in_a_database_in_memory_too() -> None:
    db = MyPilotDB("sqlite+aiosqlite:///:memory:")
    async with db.engine_context():
        await db.create_tables()
        await db.add_ce("ce", 5, 1.0)
        ends = await asyncio.gather(*(db.submit_pilot("ce", "lhcb") for _ in range(20)), return_exceptions=True)
        assert sorted(type(end).__name__ for end in ends) == ["NoRoomError"] * 15 + ["int"] * 5
        async with db:
            assert len(await db.get_pilots_by_status(S.SUBMITTED, "lhcb")) == 5


async def test_a_round_locks_compute_elements_in_the_order_of_the_checks(
    postgresql_server: Any, empty_database: Any
) -> None:
    database = MyPilotDB(await empty_database("postgresql"))
    async with database.engine_context():
        await database.create_tables()
        for name in ("a", "B"):  # a locale may have them so, as the table has; Python has not
            await database.add_ce(name, 1, 1.0)
        async with database:
            await database.record_ce_error("B", "first")
            # In a context of its own, or it would be of this transaction.
            counting = database.pending_requests(since=datetime.now(UTC))
            round = asyncio.create_task(counting, context=contextvars.Context())
            waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            async with database.engine.connect() as looking:
                await until(lambda: looking.scalar(waiting), "the other transaction waits for a lock")
            await database.record_ce_error("a", "second")
        assert await round == {}


@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
async def test_a_killed_server_does_not_exhaust_the_connection_pool(
    kind: str, request: pytest.FixtureRequest, empty_database: Any, stoppable: Any
) -> None:
    server = stoppable(request.getfixturevalue(f"{kind}_server"))
    database = MyPilotDB(await empty_database(kind))
    async with database.engine_context():
        await database.create_tables()
        pool: Any = database.engine.pool

        async def look() -> None:
            await database.list_ces(vo=None)

        async def works() -> bool:
            with contextlib.suppress(SQLDBUnavailableError, SQLAlchemyError, OSError):
                await look()
                return True
            return False

        for _ in range(3):
            await asyncio.gather(*(asyncio.create_task(look()) for _ in range(5)))  # so many are open, and idle
            server.kill()
            for _ in range(5):
                with pytest.raises((SQLDBUnavailableError, SQLAlchemyError, OSError)):
                    await look()
            server.start()
            await until(works, "the server is back", seconds=30, pause=0.1)
            assert pool.checkedout() == 0, pool.status()
