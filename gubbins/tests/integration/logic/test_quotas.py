"""Quotas of sites: submissions pause, then grow again, without an open circuit."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import pytest
from support.moving_clock import Clock

from gubbins.ces import CEBackend, Observation, Observed, PilotAtCE, SubmitOutcome
from gubbins.ces.protocol import CESettings
from gubbins.db.sql import MyPilotDB
from gubbins.domain.exceptions import CEPausedError, CEQuotaError, CERefusedError
from gubbins.logic import my_pilots as logic
from gubbins.tasks.my_pilots import MyPilotTask

pytestmark = pytest.mark.usefixtures("inline_sqlite")


class Limited(CEBackend[CESettings]):
    """A site that takes so many of our pilots."""

    Settings = CESettings
    quota: ClassVar[int] = 20
    pilots: ClassVar[dict[str, Observed]] = {}
    refused: ClassVar[list[list[str]]] = []

    async def submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        free = max(0, self.quota - sum(state is Observed.RUNNING for state in self.pilots.values()))
        self.pilots.update({pilot.stamp: Observed.RUNNING for pilot in pilots[:free]})
        if refused := [pilot.stamp for pilot in pilots[free:]]:
            self.refused.append(refused)
        return {
            **{pilot.stamp: SubmitOutcome(reference=pilot.stamp) for pilot in pilots[:free]},
            **{stamp: SubmitOutcome(error="QOSMaxSubmitJobPerUserLimit", quota=True) for stamp in refused},
        }

    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        return {
            pilot.stamp: Observation(self.pilots[pilot.stamp]) for pilot in pilots if pilot.stamp in self.pilots
        }

    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, install_backend: Any) -> type[Limited]:
    monkeypatch.setattr(Limited, "quota", 20)
    monkeypatch.setattr(Limited, "pilots", {})
    monkeypatch.setattr(Limited, "refused", [])
    install_backend("limited", Limited)
    return Limited


async def cycle(db: MyPilotDB, time: Clock) -> None:
    for stamp in (await logic.request_pilots(db, "lhcb", vos=["lhcb"])).get("ce", ()):
        with contextlib.suppress(CEQuotaError, CEPausedError):
            await logic.submit_requested_pilot(db, "ce", "lhcb", stamp=stamp)
    await logic.transition_pilot_states(db, "lhcb")
    time.at += timedelta(seconds=60)


async def test_a_quota_opens_no_circuit_and_is_probed_once_a_minute(
    sqlite_db: MyPilotDB, site: type[Limited], time: Clock
) -> None:
    await sqlite_db.add_ce("ce", 100, 1.0, backend="limited")
    await cycle(sqlite_db, time)
    assert (len(site.pilots), len(site.refused)) == (20, 1)
    (ce,) = await logic.list_ces(sqlite_db)
    assert ce["last_error"] == "quota of the site: 20"
    assert [circuit["failures"] for circuit in ce["circuits"].values()] == [0, 0]
    for _ in range(20):
        await cycle(sqlite_db, time)
    # At most one try in a minute: neither a flood of refusals, nor an ever longer pause.
    assert 5 <= len(site.refused) <= 21
    assert len(site.pilots) == 20
    site.quota = 60
    for _ in range(20):
        await cycle(sqlite_db, time)
    assert len(site.pilots) == 60
    site.quota = 1000
    for _ in range(60):
        await cycle(sqlite_db, time)
    assert len(site.pilots) == 100
    assert (await logic.list_ces(sqlite_db))[0]["last_error"] is None


async def test_slots_of_ended_pilots_are_filled_below_the_quota(
    db: MyPilotDB, site: type[Limited], time: Clock
) -> None:
    await db.add_ce("ce", 100, 1.0, backend="limited")
    for _ in range(2):
        await cycle(db, time)
    for stamp in list(site.pilots)[:10]:
        site.pilots[stamp] = Observed.DONE
    for _ in range(4):
        await cycle(db, time)
    assert sum(state is Observed.RUNNING for state in site.pilots.values()) == 20
    assert len(site.pilots) == 30


async def test_a_manual_submission_is_refused_with_the_quota_and_enabling_resets_it(
    db: MyPilotDB, site: type[Limited], time: Clock
) -> None:
    await db.add_ce("ce", 100, 1.0, backend="limited")
    site.quota = 1
    await logic.submit_pilot(db, "ce", "lhcb")
    with pytest.raises(CEQuotaError, match=r"quota of the site: 1 \(QOSMaxSubmitJobPerUserLimit\)") as refusal:
        await logic.submit_pilot(db, "ce", "lhcb")
    assert refusal.value.public == "no room at compute element 'ce': quota of the site: 1"
    assert await db.count_active("ce") == 1
    with pytest.raises(CEPausedError, match="quota of the site: 1"):
        await logic.submit_pilot(db, "ce", "lhcb")
    assert await MyPilotTask("ce", "lhcb").execute(my_pilot_db=db) is None
    site.quota = 2
    await logic.set_ce_enabled(db, "ce", True)
    await logic.submit_pilot(db, "ce", "lhcb")


async def test_no_response_is_not_a_refusal(db: MyPilotDB, scripted: Any) -> None:
    await db.add_ce("ce", 9, 1.0, backend="scripted")
    scripted.submissions["ce"] = TimeoutError("sbatch has not responded within 20 s")
    with pytest.raises(CERefusedError, match="did not confirm the pilot: sbatch has not responded"):
        await logic.submit_pilot(db, "ce", "lhcb")


async def test_a_warning_is_stored_and_is_not_a_failure(db: MyPilotDB, scripted: Any) -> None:
    await db.add_ce("ce", 9, 1.0, backend="scripted")
    scripted.submissions["ce"] = SubmitOutcome(reference="job.1")
    scripted.observations["ce"] = Observation(Observed.NO_NEWS)
    scripted.warning = "sacct: down"
    await logic.cancel_pilot(db, await logic.submit_pilot(db, "ce", "lhcb"), by="alice")
    assert (await logic.list_ces(db))[0]["last_error"] == "sacct: down"
    await logic.submit_pilot(db, "ce", "lhcb")
    for _ in range(9):
        await logic.transition_pilot_states(db, "lhcb")
    (ce,) = await logic.list_ces(db)
    assert ce["last_error"] == "sacct: down"
    assert ce["circuits"]["status"]["failures"] == 0
    assert await logic.submit_pilot(db, "ce", "lhcb")
    scripted.warning = None
    await logic.transition_pilot_states(db, "lhcb")
    assert (await logic.list_ces(db))[0]["last_error"] is None
