"""A site that answers and does not list our pilots is not flooded with more of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import pytest
from diracx.tasks.operations.health import Severity
from moving_clock import Clock

from gubbins.ces import CEBackend, Observation, Observed, PilotAtCE, SubmitOutcome
from gubbins.ces.protocol import CESettings
from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.domain.exceptions import CEPausedError
from gubbins.health import find_alerts
from gubbins.logic import my_pilots as logic


class Forgetful(CEBackend[CESettings]):
    """A site that takes every pilot and lists those that it is told to list, as they are."""

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


async def cycle(db: MyPilotDB, time: Clock) -> int:
    """One round of submissions and one check; the number of pilots submitted."""
    asked = (await logic.request_pilots(db, "lhcb", vos=["lhcb"])).get("ce", [])
    for stamp in asked:
        await logic.submit_requested_pilot(db, "ce", "lhcb", stamp=stamp)
    await logic.transition_pilot_states(db, "lhcb")
    time.at += timedelta(minutes=10)
    return len(asked)


async def test_a_site_that_lists_none_of_our_pilots_gets_no_second_set_in_a_day(
    sqlite_db: MyPilotDB, site: type[Forgetful], time: Clock
) -> None:
    await sqlite_db.add_ce("ce", 10, 1.0, backend="forgetful")
    for _ in range(24 * 6):
        await cycle(sqlite_db, time)
    assert len(site.submitted) == 10
    # They have been taken for lost, and what stops the submissions is still told.
    (ce,) = await logic.list_ces(sqlite_db)
    assert ce["active"] == 0
    assert "10 pilots in a row that it does not list" in ce["last_error"]
    (alert,) = find_alerts([ce], {})
    assert (alert.check, alert.severity, alert.count) == ("ce_pilots_missing", Severity.CRITICAL, 10)
    assert ce["last_error"] in alert.summary
    with pytest.raises(CEPausedError, match="10 pilots in a row that it does not list"):
        await logic.submit_pilot(sqlite_db, "ce", "lhcb")
    # An operator who has mended it says so, and pilots that are seen leave it open.
    await logic.set_ce_enabled(sqlite_db, "ce", True)
    site.lists_every = 1
    assert await cycle(sqlite_db, time) == 10
    (ce,) = await logic.list_ces(sqlite_db)
    assert ce["last_error"] is None
    assert find_alerts([ce], {}) == []


async def test_a_small_site_is_stopped_as_well_and_opens_by_itself_when_pilots_are_found_again(
    sqlite_db: MyPilotDB, site: type[Forgetful], time: Clock
) -> None:
    await sqlite_db.add_ce("ce", 3, 1.0, backend="forgetful", rules={"max_missing": 6})
    for _ in range(24 * 6):
        await cycle(sqlite_db, time)
    assert len(site.submitted) == 6
    await logic.set_ce_enabled(sqlite_db, "ce", True)
    for _ in range(2):
        await cycle(sqlite_db, time)
    assert len(site.submitted) == 9
    await sqlite_db.count_missing("ce", 9, any_seen=False)
    assert await cycle(sqlite_db, time) == 0
    site.listed |= dict.fromkeys(site.submitted[-3:], Observed.DONE)
    for _ in range(4):
        await cycle(sqlite_db, time)
    assert len(site.submitted) > 9


async def test_where_others_are_seen_a_share_of_missing_ones_stops_submissions(
    db: MyPilotDB, site: type[Forgetful], time: Clock
) -> None:
    await db.add_ce("ce", 12, 1.0, backend="forgetful", rules={"max_missing": 3, "max_missing_share": 0.5})
    site.lists_every = 3  # 4 of 12
    assert await cycle(db, time) == 12
    site.listed |= dict.fromkeys(list(site.listed)[:2], Observed.DONE)
    for _ in range(2):
        assert await cycle(db, time) == 0
    (ce,) = await logic.list_ces(db)
    assert ce["last_error"] == "8 of its 10 pilots are missing: it answers, and does not list them"
    assert [(alert.check, alert.count) for alert in find_alerts([ce], {})] == [("ce_pilots_missing", 8)]
    with pytest.raises(CEPausedError, match="8 of its 10 pilots are missing"):
        await logic.submit_pilot(db, "ce", "lhcb")
    counted = await db.get_pilot_summary("lhcb")
    assert counted == {MyPilotStatus.DONE: 2, MyPilotStatus.RUNNING: 2, MyPilotStatus.SUBMITTED: 8}


async def test_a_few_missing_pilots_stop_nothing(db: MyPilotDB, site: type[Forgetful], time: Clock) -> None:
    await db.add_ce("ce", 40, 1.0, backend="forgetful")
    site.lists_every = 1
    assert await cycle(db, time) == 40
    for stamp in site.submitted[:10]:
        del site.listed[stamp]
    await cycle(db, time)
    await db.set_ce("ce", capacity=45, success_rate=1.0, backend="forgetful")
    assert await cycle(db, time) == 5
