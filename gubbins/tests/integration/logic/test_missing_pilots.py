"""Missing pilots: a site that does not list our pilots gets no replacements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import pytest
from diracx.tasks.operations.health import Severity
from support.moving_clock import Clock

from gubbins.ces import CEBackend, Observation, Observed, PilotAtCE, SubmitOutcome
from gubbins.ces.protocol import CESettings
from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.domain.exceptions import CEPausedError
from gubbins.health import find_alerts
from gubbins.logic import my_pilots as logic

pytestmark = pytest.mark.usefixtures("inline_sqlite")


class Forgetful(CEBackend[CESettings]):
    """A site that accepts every pilot, and lists selected ones in their state."""

    Settings = CESettings
    submitted: ClassVar[list[str]] = []
    listed: ClassVar[dict[str, Observed]] = {}
    lists_every: ClassVar[int] = 0
    """Lists so many of them on its own: each second one, each third…; 0: none."""

    async def submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        for pilot in pilots:
            self.submitted.append(pilot.stamp)
            if self.lists_every and len(self.submitted) % self.lists_every == 0:
                self.listed[pilot.stamp] = Observed.RUNNING
        return {pilot.stamp: SubmitOutcome(reference=pilot.stamp) for pilot in pilots}

    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        return {
            pilot.stamp: Observation(self.listed[pilot.stamp]) for pilot in pilots if pilot.stamp in self.listed
        }

    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, install_backend: Any) -> type[Forgetful]:
    monkeypatch.setattr(Forgetful, "submitted", [])
    monkeypatch.setattr(Forgetful, "listed", {})
    monkeypatch.setattr(Forgetful, "lists_every", 0)
    install_backend("forgetful", Forgetful)
    return Forgetful


async def cycle(db: MyPilotDB, time: Clock, *, report: bool = False) -> int:
    """One round of submissions, with reports of started pilots, and one check; the number of pilots submitted."""
    requests = (await logic.request_pilots(db, "lhcb", vos=["lhcb"])).get("ce", [])
    for stamp in requests:
        await logic.submit_requested_pilot(db, "ce", "lhcb", stamp=stamp)
    for pilot in await db.get_pilots_by_status(MyPilotStatus.SUBMITTED, "lhcb") if report else ():
        await db.update_pilot_status(pilot["pilot_id"], MyPilotStatus.RUNNING)
    await logic.transition_pilot_states(db, "lhcb")
    time.at += timedelta(minutes=20)
    return len(requests)


async def test_a_site_that_lists_no_pilots_gets_no_replacements(
    sqlite_db: MyPilotDB, site: type[Forgetful], time: Clock
) -> None:
    await sqlite_db.add_ce("ce", 10, 1.0, backend="forgetful")
    for _ in range(24 * 3):
        await cycle(sqlite_db, time)
    assert len(site.submitted) == 10
    # They have been taken for lost, and the reason that stops the submissions is still shown.
    (ce,) = await logic.list_ces(sqlite_db)
    assert ce["active"] == 0
    assert "10 pilots that it does not list" in ce["last_error"]
    (alert,) = find_alerts([ce], {})
    assert (alert.check, alert.severity, alert.count) == ("ce_pilots_missing", Severity.CRITICAL, 10)
    assert ce["last_error"] in alert.summary
    with pytest.raises(CEPausedError, match="10 pilots that it does not list"):
        await logic.submit_pilot(sqlite_db, "ce", "lhcb")
    # An operator who has mended it says so, and pilots that are seen leave it open.
    await logic.set_ce_enabled(sqlite_db, "ce", True)
    site.lists_every = 1
    assert await cycle(sqlite_db, time) == 10
    (ce,) = await logic.list_ces(sqlite_db)
    assert ce["last_error"] is None
    assert find_alerts([ce], {}) == []


async def test_pilots_that_only_reported_themselves_get_no_replacements(
    sqlite_db: MyPilotDB, site: type[Forgetful], time: Clock
) -> None:
    await sqlite_db.add_ce("ce", 10, 1.0, backend="forgetful")
    for _ in range(24 * 3):
        await cycle(sqlite_db, time, report=True)
    assert len(site.submitted) == 10


async def test_submissions_to_a_small_site_stop_and_continue_when_pilots_reappear(
    sqlite_db: MyPilotDB, site: type[Forgetful], time: Clock
) -> None:
    await sqlite_db.add_ce("ce", 3, 1.0, backend="forgetful", rules={"max_missing": 6})
    for _ in range(24 * 3):
        await cycle(sqlite_db, time)
    assert len(site.submitted) == 6
    await logic.set_ce_enabled(sqlite_db, "ce", True)
    for _ in range(2):
        await cycle(sqlite_db, time)
    assert len(site.submitted) == 9
    await sqlite_db.count_never_seen("ce", 6)
    assert await cycle(sqlite_db, time) == 0
    site.listed |= dict.fromkeys(site.submitted[-3:], Observed.DONE)
    for _ in range(4):
        await cycle(sqlite_db, time)
    assert len(site.submitted) > 9


async def test_a_fraction_of_missing_pilots_stops_submissions_although_others_are_seen(
    db: MyPilotDB, site: type[Forgetful], time: Clock
) -> None:
    await db.add_ce("ce", 12, 1.0, backend="forgetful", rules={"max_missing": 3, "max_missing_share": 0.5})
    site.lists_every = 3  # 4 of 12
    assert await cycle(db, time) == 12
    site.listed |= dict.fromkeys(list(site.listed)[:2], Observed.DONE)
    for _ in range(2):
        assert await cycle(db, time) == 0
    (ce,) = await logic.list_ces(db)
    assert ce["last_error"] == (
        "it has accepted 7 pilots that it does not list, and lists 2: "
        "when that is corrected, `gubbins ce enable ce`"
    )
    assert [(alert.check, alert.count) for alert in find_alerts([ce], {})] == [("ce_pilots_missing", 8)]
    with pytest.raises(CEPausedError, match="7 pilots that it does not list"):
        await logic.submit_pilot(db, "ce", "lhcb")
    counted = await db.get_pilot_summary("lhcb")
    assert counted == {MyPilotStatus.DONE: 2, MyPilotStatus.RUNNING: 2, MyPilotStatus.SUBMITTED: 8}


@pytest.mark.parametrize("lists_every", [10, 2])
@pytest.mark.parametrize("end", [MyPilotStatus.RUNNING, MyPilotStatus.DONE])
async def test_lost_pilots_that_were_never_seen_do_not_let_submissions_continue(
    sqlite_db: MyPilotDB, site: type[Forgetful], time: Clock, lists_every: int, end: MyPilotStatus
) -> None:
    await sqlite_db.add_ce("ce", 20, 1.0, backend="forgetful")
    site.lists_every = lists_every
    for _ in range(24 * 3):
        await cycle(sqlite_db, time)
        site.listed |= dict.fromkeys(site.listed, Observed(end.upper()))
    assert len(site.submitted) == 20
    listed = 20 // lists_every
    assert await sqlite_db.get_pilot_summary("lhcb") == {MyPilotStatus.FAILED: 20 - listed, end: listed}
    (ce,) = await logic.list_ces(sqlite_db)
    assert ce["missing"] == 0
    assert "pilots that it does not list" in ce["last_error"]
    await logic.set_ce_enabled(sqlite_db, "ce", True)
    assert await cycle(sqlite_db, time) == 20 - ce["active"]


async def test_pilots_that_end_properly_outweigh_a_few_that_were_never_seen(
    sqlite_db: MyPilotDB, site: type[Forgetful], time: Clock
) -> None:
    await sqlite_db.add_ce("ce", 20, 1.0, backend="forgetful", rules={"max_per_cycle": 4})
    for number in range(24 * 3):
        site.lists_every = int(number % 30 > 0)  # four of 120 are never seen
        await cycle(sqlite_db, time)
        site.listed |= dict.fromkeys(site.listed, Observed.DONE)
    assert len(site.submitted) == 4 * 24 * 3


async def test_a_few_missing_pilots_do_not_stop_submissions(
    db: MyPilotDB, site: type[Forgetful], time: Clock
) -> None:
    await db.add_ce("ce", 40, 1.0, backend="forgetful")
    site.lists_every = 1
    assert await cycle(db, time) == 40
    for stamp in site.submitted[:10]:
        del site.listed[stamp]
    await cycle(db, time)
    await db.set_ce("ce", capacity=45, success_rate=1.0, backend="forgetful")
    assert await cycle(db, time) == 5
    for stamp in site.submitted[10:30]:
        del site.listed[stamp]
    await cycle(db, time)
    (ce,) = await logic.list_ces(db)
    assert ce["last_error"] == "30 of its 45 pilots are missing: it responds, and does not list them"
