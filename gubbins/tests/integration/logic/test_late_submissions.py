"""Submissions that are late, and those that never reach their site."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.pilot_requests import request_pilots

from gubbins.ces import Observation, Observed, PilotAtCE, SubmitOutcome
from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.exceptions import CERefusedError
from gubbins.logic import my_pilots as logic

S = MyPilotStatus
STAMP = "0" * 32
Meanwhile = Callable[[Callable[[], Awaitable[object]]], None]


@pytest.fixture
def meanwhile(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> Meanwhile:
    """Run an action while a submission is under way: its worker is halted then."""
    happen: list[Callable[[], Awaitable[object]]] = []

    async def submit(self: Any, pilots: Sequence[PilotAtCE]) -> Any:
        response = {pilot.stamp: scripted.submissions[self.ce.name] for pilot in pilots}
        if happen:
            await happen.pop()()
        return response

    monkeypatch.setattr(scripted, "submit", submit)
    return happen.append


async def release(db: MyPilotDB) -> int:
    return await db.release_pilots([row.pilot_id for row in await db.get_active_pilots(vo="lhcb")])


async def test_a_pilot_accepted_after_its_release_is_restored_and_cancelled(
    db: MyPilotDB, scripted: Any, meanwhile: Meanwhile
) -> None:
    await db.add_ce("ce", 3, 1.0, backend="scripted")
    scripted.submissions["ce"] = SubmitOutcome(reference="job.1")
    scripted.cancellations["ce"] = ConnectionError("connection reset")
    meanwhile(lambda: release(db))
    with pytest.raises(CERefusedError, match="abandoned"):
        await logic.submit_pilot(db, "ce", "lhcb", stamp=STAMP)
    [late] = await db.get_pilots_by_status(S.SUBMITTED, vo="lhcb")
    assert (late["stamp"], late["reference"]) == (STAMP, "job.1")
    assert late["cancel_requested_at"] is not None
    assert "abandoned" in late["last_error"]
    # The first request was lost.
    scripted.cancellations.clear()
    scripted.observations["ce"] = Observation(Observed.RUNNING)
    assert await logic.transition_pilot_states(db, "lhcb") == {S.RUNNING: 1}
    scripted.observations["ce"] = Observation(Observed.FAILED, "cancelled")
    assert await logic.transition_pilot_states(db, "lhcb") == {S.FAILED: 1}
    assert scripted.cancelled == [STAMP] * 2
    assert (await db.get_pilot(late["pilot_id"]))["last_error"] == "cancelled"
    assert await logic.count_illegal_histories(db) == 0


async def test_a_pilot_accepted_after_its_release_takes_a_slot_beyond_the_capacity(
    db: MyPilotDB, scripted: Any, meanwhile: Meanwhile, caplog: pytest.LogCaptureFixture
) -> None:
    await db.add_ce("ce", 1, 1.0, backend="scripted")
    scripted.submissions["ce"] = SubmitOutcome(reference="job.1")

    async def another_takes_the_slot() -> None:
        await release(db)
        scripted.submissions["ce"] = SubmitOutcome(reference="job.2")
        await logic.submit_pilot(db, "ce", "dteam")

    meanwhile(another_takes_the_slot)
    with caplog.at_level(logging.WARNING), pytest.raises(CERefusedError):
        await logic.submit_pilot(db, "ce", "lhcb")
    assert "2 of 1 slots are taken" in caplog.text
    # The other is left alone, whatever id it has got, and no pilot gets a slot before both are gone.
    [other] = await db.get_pilots_by_status(S.SUBMITTED, vo="dteam")
    assert (other["reference"], other["cancel_requested_at"]) == ("job.2", None)
    [ce] = await db.list_ces(vo=None)
    assert (ce["active"], ce["available_slots"]) == (2, 0)
    with pytest.raises(logic.PilotSubmissionError):
        await logic.submit_pilot(db, "ce", "lhcb")
    assert await request_pilots(db, "dteam", vos=["dteam", "lhcb"]) == {}


@pytest.mark.parametrize("same", [True, False])
async def test_a_faster_repeated_submission_is_the_pilot(
    db: MyPilotDB, scripted: Any, meanwhile: Meanwhile, same: bool
) -> None:
    await db.add_ce("ce", 1, 1.0, backend="scripted")
    scripted.submissions["ce"] = SubmitOutcome(reference="job.1")

    async def submitted_again() -> None:
        await release(db)
        scripted.submissions["ce"] = SubmitOutcome(reference="job.1" if same else "job.2")
        await logic.submit_pilot(db, "ce", "lhcb", stamp=STAMP)

    meanwhile(submitted_again)
    if same:
        pilot_id = await logic.submit_pilot(db, "ce", "lhcb", stamp=STAMP)
        assert (await db.get_pilot(pilot_id))["stamp"] == STAMP
    else:  # two jobs: this one is not followed
        with pytest.raises(CERefusedError):
            await logic.submit_pilot(db, "ce", "lhcb", stamp=STAMP)
    [pilot] = await db.get_pilots_by_status(S.SUBMITTED, vo="lhcb")
    assert pilot["reference"] == ("job.1" if same else "job.2")
    assert pilot["cancel_requested_at"] is None
    assert len(scripted.cancelled) == (0 if same else 1)


HOST = {"host": "127.0.0.1", "port": 1, "known_hosts": "/dev/null"}


@pytest.mark.parametrize(
    ("backend", "settings", "words"),
    [
        ("arc", {"url": "https://127.0.0.1:1/arex", "token": "FILE"}, "connection"),
        ("arc", {"url": "https://127.0.0.1:1/arex", "token": "/absent"}, "cannot read the token"),
        ("ssh", HOST, "no SSH connection"),
        ("slurm", {"directory": "/pilots", "ssh": HOST}, "no SSH connection"),
        ("batch", {"system": "pbs", "directory": "/pilots", "ssh": HOST}, "no SSH connection"),
        ("htcondor", {"collector": "127.0.0.1:1"}, "Connection refused"),
        ("htcondor", {"collector": "127.0.0.1:1", "token": "/absent"}, "cannot read the token"),
    ],
)
async def test_a_submission_that_does_not_reach_its_site_keeps_no_slot(
    sqlite_db: MyPilotDB, tmp_path: Path, backend: str, settings: dict[str, Any], words: str
) -> None:
    (tmp_path / "token").write_text("token")
    own = {name: str(tmp_path / "token") if value == "FILE" else value for name, value in settings.items()}
    await sqlite_db.add_ce("ce", 3, 1.0, backend=backend, settings={"default_script": "true", **own})
    with pytest.raises(CERefusedError, match=words):
        await logic.submit_pilot(sqlite_db, "ce", "lhcb")
    ce = await sqlite_db.get_ce("ce")
    assert (ce["active"], ce["circuits"][CECall.SUBMIT]["failures"]) == (0, 1)
