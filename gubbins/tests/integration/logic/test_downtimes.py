"""Downtimes of compute elements."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta

import pytest
from diracx.db.sql import ResourceStatusDB
from diracx.db.sql.rss.schema import ResourceStatus, SiteStatus
from sqlalchemy import delete, insert
from support.databases import with_tables
from support.moving_clock import Clock
from support.pilot_requests import request_pilots

from gubbins.db.sql import MyPilotDB
from gubbins.domain import clock
from gubbins.domain.downtimes import parse_moment
from gubbins.domain.exceptions import CEPausedError, DowntimeError, DowntimeNotFoundError, UnknownCEError
from gubbins.health import find_alerts
from gubbins.logic import my_pilots as logic
from gubbins.tasks.my_pilots import MyImportDowntimesTask


async def plan(db: MyPilotDB, start_hours: float, end_hours: float, drain_hours: float = 0, ce: str = "ce") -> int:
    now = clock.now()
    downtime = await logic.add_downtime(
        db,
        ce,
        now + timedelta(hours=start_hours),
        now + timedelta(hours=end_hours),
        "new switches",
        by="alice",
        drain=timedelta(hours=drain_hours),
    )
    return downtime.id


async def is_open(db: MyPilotDB) -> bool:
    try:
        await logic.submit_pilot(db, "ce", "lhcb")
    except CEPausedError as error:
        return "new switches" not in error.public
    return True


async def test_a_downtime_stops_submissions_from_its_drain_to_its_end(db: MyPilotDB, time: Clock) -> None:
    await db.add_ce("ce", 50, 1.0)
    await plan(db, 10, 12, drain_hours=4)
    assert await is_open(db)
    time.at += timedelta(hours=6)
    assert not await is_open(db)
    assert await request_pilots(db, "lhcb", vos=["lhcb"]) == {}
    [ce] = await logic.list_ces(db)
    assert ce["downtime"].describe(clock.now()).startswith("drained for its downtime from")
    # Those that it has are followed.
    assert await logic.transition_pilot_states(db, "lhcb")
    time.at += timedelta(hours=5)
    assert not await is_open(db)
    time.at += timedelta(hours=1)
    assert await is_open(db)
    assert (await logic.get_ce(db, "ce"))["downtime"] is None
    assert await logic.list_downtimes(db) == []
    assert [each.ce_name for each in await logic.list_downtimes(db, past=True)] == ["ce"]


async def test_a_refusal_for_a_downtime_names_the_remedy(db: MyPilotDB, time: Clock) -> None:
    await db.add_ce("ce", 50, 1.0)
    number = await plan(db, 1, 2, drain_hours=4)
    with pytest.raises(CEPausedError, match=f"`gubbins ce downtime remove {number}` ends it$") as caught:
        await logic.submit_pilot(db, "ce", "lhcb")
    assert "gubbins" not in caught.value.public
    await logic.remove_downtime(db, number)
    assert await is_open(db)


async def test_a_downtime_stops_submissions_that_were_checked_before_it_was_added(db: MyPilotDB) -> None:
    await db.add_ce("ce", 50, 1.0)
    [stamp] = (await db.add_requests("lhcb", {"ce": 1}))["ce"]
    number = await plan(db, 0, 2)
    with pytest.raises(CEPausedError, match="in downtime until"):
        await db.submit_pilot("ce", "lhcb")
    with pytest.raises(CEPausedError, match=f"`gubbins ce downtime remove {number}` ends it$"):
        await db.submit_requested("ce", [(stamp, "lhcb")])
    await logic.remove_downtime(db, number)
    assert (await db.submit_requested("ce", [(stamp, "lhcb")]))[0].keys() == {stamp}


async def test_overlapping_downtimes_end_with_the_last_one(db: MyPilotDB, time: Clock) -> None:
    await db.add_ce("ce", 50, 1.0)
    long = await plan(db, -1, 5)
    await plan(db, -1, 2)
    time.at += timedelta(hours=3)
    assert not await is_open(db)
    await logic.remove_downtime(db, long)
    assert await is_open(db)


@pytest.mark.parametrize(
    ("start", "end", "drain", "said"),
    [
        (2, 1, 0, "must end after its start"),
        (1, 1, 0, "must end after its start"),
        (-3, -1, 0, "over already"),
        (1, 24 * 400, 0, "no longer than that"),
        (24 * 400, 24 * 401, 0, "starts within 366 days"),
        (1, 2, -1, "drained for 0 seconds"),
        (1, 2, 24 * 400, "drained for 0 seconds"),
    ],
)
async def test_invalid_times_of_a_downtime_are_refused(
    sqlite_db: MyPilotDB, start: float, end: float, drain: float, said: str
) -> None:
    await sqlite_db.add_ce("ce", 50, 1.0)
    with pytest.raises(DowntimeError, match=said):
        await plan(sqlite_db, start, end, drain)
    assert await logic.list_downtimes(sqlite_db, past=True) == []


async def test_unknown_names_and_empty_reasons_are_refused(sqlite_db: MyPilotDB) -> None:
    with pytest.raises(UnknownCEError):
        await plan(sqlite_db, 1, 2)
    with pytest.raises(UnknownCEError):
        await logic.list_downtimes(sqlite_db, "ce")
    with pytest.raises(DowntimeNotFoundError):
        await logic.remove_downtime(sqlite_db, 7)
    await sqlite_db.add_ce("ce", 50, 1.0)
    now = clock.now()
    with pytest.raises(DowntimeError, match="needs a reason"):
        await logic.add_downtime(sqlite_db, "ce", now, now + timedelta(hours=1), " \n ", by="alice")


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-12-01T08:00", datetime(2026, 12, 1, 8, tzinfo=UTC)),
        ("2026-12-01 08:00", datetime(2026, 12, 1, 8, tzinfo=UTC)),
        ("2026-12-01", datetime(2026, 12, 1, tzinfo=UTC)),
        ("2026-12-01T08:00+01:00", datetime(2026, 12, 1, 7, tzinfo=UTC)),
        ("2026-12-01T08:00Z", datetime(2026, 12, 1, 8, tzinfo=UTC)),
    ],
)
def test_times_are_utc_by_default(text: str, moment: datetime) -> None:
    assert parse_moment(text) == moment


@pytest.mark.parametrize(
    "text", ["", "tomorrow", "2026-13-01", "0001-01-01T00:00+14:00", "9999-12-31T23:59-14:00", "x" * 9999]
)
def test_an_invalid_time_is_an_error_of_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="is no time like") as caught:
        parse_moment(text)
    assert len(str(caught.value)) < 150


async def test_a_vo_sees_the_downtimes_of_the_compute_elements_that_serve_it(sqlite_db: MyPilotDB) -> None:
    await sqlite_db.add_ce("ours", 1, 1.0, vos=["lhcb"])
    await sqlite_db.add_ce("theirs", 1, 1.0, vos=["dteam"])
    for name in ("ours", "theirs"):
        await plan(sqlite_db, 1, 2, ce=name)
    assert [each.ce_name for each in await logic.list_downtimes(sqlite_db, vo="lhcb")] == ["ours"]
    with pytest.raises(UnknownCEError):
        await logic.list_downtimes(sqlite_db, "theirs", "lhcb")


async def alarms(db: MyPilotDB) -> int:
    quiet = await logic.ces_in_downtime(db, clock.now() - timedelta(hours=1))
    return len(find_alerts([ce for ce in await logic.list_ces(db) if ce["name"] not in quiet], {}))


@pytest.mark.parametrize("early", [False, True])
async def test_there_are_no_alerts_during_a_downtime_and_for_pilots_that_ended_in_it(
    sqlite_db: MyPilotDB, time: Clock, early: bool
) -> None:
    db = sqlite_db
    await db.add_ce("ce", 50, 1.0)
    await db.ban_ce("ce", reason="it burns")
    number = await plan(db, 1, 10 if early else 3)

    found = [await alarms(db)]
    for hour in range(1, 5):
        time.at += timedelta(hours=1)
        if early and hour == 3:
            await logic.remove_downtime(db, number)
        found.append(await alarms(db))
    assert found == [1, 0, 0, 0, 1]


@pytest.mark.parametrize(("minutes", "later"), [(5, 1), (30, 0)])
async def test_a_downtime_that_is_removed_at_once_hides_no_alerts(
    sqlite_db: MyPilotDB, time: Clock, minutes: int, later: int
) -> None:
    await sqlite_db.add_ce("ce", 50, 1.0)
    await sqlite_db.ban_ce("ce", reason="it burns")
    number = await plan(sqlite_db, 0, 10)
    time.at += timedelta(minutes=minutes)
    assert await alarms(sqlite_db) == 0
    await logic.remove_downtime(sqlite_db, number)
    assert await alarms(sqlite_db) == later


async def test_a_downtime_that_is_removed_before_its_start_was_none(sqlite_db: MyPilotDB, time: Clock) -> None:
    await sqlite_db.add_ce("ce", 50, 1.0)
    number = await plan(sqlite_db, 1, 3, drain_hours=4)
    await logic.remove_downtime(sqlite_db, number)
    assert await logic.list_downtimes(sqlite_db, past=True) == []
    with pytest.raises(DowntimeNotFoundError):
        await logic.remove_downtime(sqlite_db, number)


@pytest.fixture(params=["sqlite", "mariadb"])
async def resource_status_db(
    request: pytest.FixtureRequest, empty_database: Callable[[str], Awaitable[str]]
) -> AsyncIterator[ResourceStatusDB]:
    database = ResourceStatusDB(await empty_database(request.param))
    async with with_tables(database):
        yield database


async def say(db: ResourceStatusDB, name: str, status: str, vo: str = "all", *, site: bool = False) -> None:
    table = SiteStatus if site else ResourceStatus
    now = datetime.now(UTC)
    row = {"Name": name, "StatusType": "all", "VO": vo, "Status": status, "Reason": "burning", "ElementType": "x"}
    if not site:
        row["ElementType"] = "ComputeElement"
    times = {"DateEffective": now, "TokenExpiration": now, "LastCheckTime": now, "TokenOwner": "rs_svc"}
    async with db:
        await db.conn.execute(delete(table).where(table.name == name))
        await db.conn.execute(insert(table).values({**row, **times}))


async def test_a_ban_in_diracx_is_a_downtime_until_it_ends(
    sqlite_db: MyPilotDB, resource_status_db: ResourceStatusDB, time: Clock
) -> None:
    db = sqlite_db
    for name, rules in [("a", {}), ("b", {"grid_ce": "b.example.org"}), ("c", {"site": "LCG.C.org"}), ("d", {})]:
        await db.add_ce(name, 5, 1.0, rules=rules)
    await say(resource_status_db, "a", "Banned")
    await say(resource_status_db, "b.example.org", "Error")
    await say(resource_status_db, "LCG.C.org", "Banned", site=True)
    await say(resource_status_db, "d", "Degraded")
    await plan(db, -1, 50, ce="d")
    task = MyImportDowntimesTask()

    async def down() -> set[str]:
        return {each.ce_name for each in await logic.list_downtimes(db) if each.source == "resource status"}

    found = await task.execute(my_pilot_db=db, resource_status_db=resource_status_db)
    assert found["a"] == "Banned in DiracX: burning"
    assert await down() == found.keys() == {"a", "b", "c"}
    time.at += timedelta(minutes=50)
    await task.execute(my_pilot_db=db, resource_status_db=resource_status_db)
    time.at += timedelta(minutes=50)
    assert await down() == {"a", "b", "c"}, "confirmed, it goes on"
    await say(resource_status_db, "a", "Active")
    await task.execute(my_pilot_db=db, resource_status_db=resource_status_db)
    assert await down() == {"b", "c"}
    assert len(await logic.list_downtimes(db, "d")) == 1, "what a user has planned is left alone"
    time.at += timedelta(minutes=61)
    assert await down() == set(), "unconfirmed downtimes expire"


@pytest.mark.parametrize(("status", "vo"), [("banned", "ALL"), ("ERROR", "All"), ("Banned", "")])
@pytest.mark.parametrize("site", [True, False])
async def test_statuses_of_dirac_are_matched_without_regard_to_case(
    sqlite_db: MyPilotDB, resource_status_db: ResourceStatusDB, status: str, vo: str, site: bool
) -> None:
    await sqlite_db.add_ce("a", 5, 1.0, rules={"site": "LCG.A.org"})
    await say(resource_status_db, "LCG.A.org" if site else "a", status, vo, site=site)
    assert await logic.import_downtimes(sqlite_db, resource_status_db) == {"a": f"{status} in DiracX: burning"}


async def test_a_ban_for_one_vo_is_not_a_downtime(
    sqlite_db: MyPilotDB, resource_status_db: ResourceStatusDB
) -> None:
    await sqlite_db.add_ce("a", 5, 1.0)
    await say(resource_status_db, "a", "Banned", vo="dteam")
    assert await logic.import_downtimes(sqlite_db, resource_status_db) == {}
    assert await MyImportDowntimesTask().execute(my_pilot_db=sqlite_db) == {}
    broken = ResourceStatusDB("sqlite+aiosqlite:////nonexistent/rss.db")
    async with broken.engine_context():
        with pytest.raises(DowntimeError, match="cannot be read"):
            await logic.import_downtimes(sqlite_db, broken)
