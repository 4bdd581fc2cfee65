"""Circuit breakers of compute elements."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update
from support.pilot_requests import request_pilots
from support.waiting import until

from gubbins.ces import Observation, Observed, SubmitOutcome
from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.db.sql.schema import ComputeElements
from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.exceptions import CEPausedError, CERefusedError
from gubbins.logic import my_pilots as logic
from gubbins.tasks.my_pilots import MyPilotTask

RULES = {"breaker_failures": 2, "breaker_pause_seconds": 60, "breaker_max_pause_seconds": 200}


class Clock:
    """A clock advanced by the test."""

    def __init__(self) -> None:
        self.at = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.at

    def passes(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)


@pytest.fixture
def time() -> Any:
    moving = Clock()
    with clock.simulated(moving):
        yield moving


async def circuit(db: MyPilotDB, call: CECall, ce: str = "ce") -> tuple[str, int]:
    seen = (await db.get_ce(ce))["circuits"][call]
    return str(seen["state"]), seen["failures"]


async def refused(db: MyPilotDB) -> None:
    with pytest.raises(CERefusedError):
        await logic.submit_pilot(db, "ce", "lhcb")


async def paused(db: MyPilotDB) -> str:
    with pytest.raises(CEPausedError) as caught:
        await logic.submit_pilot(db, "ce", "lhcb")
    return str(caught.value)


async def test_submissions_pause_after_failures_with_backoff_and_a_single_probe(
    db: MyPilotDB, scripted: Any, time: Clock
) -> None:
    await db.add_ce("ce", 9, 1.0, backend="scripted", rules=RULES)
    scripted.submissions["ce"] = SubmitOutcome(error="quota exceeded")
    await refused(db)
    assert await circuit(db, CECall.SUBMIT) == ("closed", 1)
    await refused(db)
    assert await circuit(db, CECall.SUBMIT) == ("open", 2)
    for pause in (60, 120, 200, 200):
        assert "quota exceeded" in await paused(db)
        # Nor does the task that a round has spawned before.
        assert await MyPilotTask("ce", "lhcb").execute(my_pilot_db=db) is None
        time.passes(pause - 1)
        assert await circuit(db, CECall.SUBMIT) == ("open", (await circuit(db, CECall.SUBMIT))[1])
        time.passes(1)
        assert (await circuit(db, CECall.SUBMIT))[0] == "half-open"
        before = len(scripted.calls)
        await refused(db)
        assert len(scripted.calls) == before + 1
    time.passes(200)
    scripted.submissions["ce"] = SubmitOutcome(reference="job.1")
    assert await logic.submit_pilot(db, "ce", "lhcb")
    assert await circuit(db, CECall.SUBMIT) == ("closed", 0)
    assert (await db.get_ce("ce"))["last_error"] is None


async def test_during_a_probe_other_submissions_wait(db: MyPilotDB, scripted: Any, time: Clock) -> None:
    await db.add_ce("ce", 9, 1.0, backend="scripted", rules=RULES | {"breaker_failures": 1})
    scripted.submissions["ce"] = ConnectionError("gone")
    await refused(db)
    time.passes(60)
    scripted.submissions["ce"] = asyncio.Event()
    probe = asyncio.create_task(logic.submit_pilot(db, "ce", "lhcb"))
    await until(lambda: len(scripted.calls) >= 2)
    assert "probes" in await paused(db)
    # A worker that died while it was trying is not waited for for ever.
    time.passes(181)
    scripted.submissions["ce"] = SubmitOutcome(reference="job.1")
    assert await logic.submit_pilot(db, "ce", "lhcb")
    probe.cancel()


async def test_failures_of_running_calls_do_not_prolong_a_pause(db: MyPilotDB, time: Clock) -> None:
    await db.add_ce("ce", 9, 1.0)
    for _ in range(10):
        await db.record_failure("ce", CECall.STATUS, "gone", failures=3, pause_seconds=60, max_pause_seconds=900)
    seen = (await db.get_ce("ce"))["circuits"][CECall.STATUS]
    assert (seen["failures"], seen["open_until"]) == (3, time.at + timedelta(seconds=60))


async def test_a_ce_whose_polls_fail_gets_no_pilots_and_is_polled_with_backoff(
    db: MyPilotDB, scripted: Any, time: Clock
) -> None:
    await db.add_ce("ce", 9, 1.0, backend="scripted", rules=RULES)
    await db.add_ce("well", 1, 1.0)
    scripted.submissions["ce"] = SubmitOutcome(reference="job.1")
    pilot_id = await logic.submit_pilot(db, "ce", "lhcb")
    scripted.observations["ce"] = ConnectionError("no route to host")
    scripted.calls.clear()
    await logic.transition_pilot_states(db, "lhcb")
    assert "its status cannot be read (no route to host)" in await paused(db)
    assert await request_pilots(db, "lhcb", vos=["lhcb"]) == {"well": 1}
    for _ in range(20):  # a check every 30 s, for ten minutes
        time.passes(30)
        await logic.transition_pilot_states(db, "lhcb")
    # At 0, 30, 90, 210 and 420 s, and never in between.
    assert scripted.calls == [("ce", "poll")] * 5
    assert (await db.get_pilot(pilot_id))["status"] is MyPilotStatus.SUBMITTED
    # Users do not cancel there meanwhile, nor take the probe: the first check that may ask it does.
    scripted.observations["ce"] = Observation(Observed.WAITING)
    for state in ("open", "half-open"):
        assert (await db.get_ce("ce"))["circuits"][CECall.STATUS]["state"] == state
        await logic.cancel_pilot(db, pilot_id, by="alice")
        assert scripted.cancelled == []
        time.passes(200)
    await logic.transition_pilot_states(db, "lhcb")
    assert len(scripted.cancelled) == 1
    assert await circuit(db, CECall.STATUS) == ("closed", 0)
    assert await logic.submit_pilot(db, "ce", "lhcb")


async def test_a_ce_with_failed_status_calls_and_no_pilots_gets_one_pilot_as_a_probe(
    db: MyPilotDB, scripted: Any, time: Clock
) -> None:
    await db.add_ce("ce", 9, 1.0, backend="scripted", rules=RULES)
    # A check asks while the only pilot is being submitted, neither gets through, and the pilot is gone.
    reserved = await db.submit_pilot("ce", "lhcb")
    scripted.observations["ce"] = ConnectionError("no route to host")
    await logic.transition_pilot_states(db, "lhcb")
    await db.release_pilots([reserved])
    assert await circuit(db, CECall.STATUS) == ("closed", 1)
    time.passes(59)
    assert await request_pilots(db, "lhcb", vos=["lhcb"]) == {}
    assert "its status cannot be read" in await paused(db)
    time.passes(1)
    assert await request_pilots(db, "lhcb", vos=["lhcb"]) == {"ce": 1}
    # Many try at once: one of them may.
    scripted.submissions["ce"] = SubmitOutcome(reference="job.1")
    [(stamp, _)] = await db.waiting_requests("ce", at_most=2)
    tried = await asyncio.gather(
        logic.submit_requested_pilot(db, "ce", "lhcb", stamp=stamp),
        *(logic.submit_pilot(db, "ce", "lhcb") for _ in range(3)),
        return_exceptions=True,
    )
    assert [type(each) for each in tried if not isinstance(each, int)] == [CEPausedError] * 3
    # It fails again: the same, after the pause.
    await logic.transition_pilot_states(db, "lhcb")
    assert await circuit(db, CECall.STATUS) == ("open", 2)
    time.passes(60)
    assert "its status cannot be read" in await paused(db)
    assert await request_pilots(db, "lhcb", vos=["lhcb"]) == {}
    scripted.observations["ce"] = Observation(Observed.WAITING)
    await logic.transition_pilot_states(db, "lhcb")
    assert await circuit(db, CECall.STATUS) == ("closed", 0)
    assert await request_pilots(db, "lhcb", vos=["lhcb"]) == {"ce": 8}


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"breaker_failures": 1, "keep_output": "some", "vos": {"lhcb": {"share": -1}}}, "keep_output"),
        ({"timeout_seconds": 5000}, "unconfirmed_seconds must be longer"),
        (["fill"], "dictionary"),
    ],
)
async def test_a_ce_with_invalid_rules_gets_no_pilots_and_others_do(
    sqlite_db: MyPilotDB, scripted: Any, rules: Any, said: str
) -> None:
    db = sqlite_db
    spec = {"capacity": 2, "success_rate": 1.0, "backend": "scripted"}
    for name in ("ce", "well"):
        await db.set_ce(name, **spec)
        scripted.submissions[name] = SubmitOutcome(reference="job.1")
        scripted.observations[name] = Observation(Observed.RUNNING)
        await logic.submit_pilot(db, name, "lhcb")
    async with db:
        row = update(ComputeElements).where(ComputeElements.name == "ce")
        await db.conn.execute(row.values(rules=rules))
    assert await logic.transition_pilot_states(db, "lhcb") == {MyPilotStatus.RUNNING: 2}
    assert await request_pilots(db, "lhcb", vos=["lhcb"]) == {"well": 1}
    assert said in await paused(db)
    assert said in (await logic.get_ce(db, "ce"))["last_error"]
    assert {ce["name"]: said in (ce["last_error"] or "") for ce in await logic.list_ces(db)} == {
        "ce": True,
        "well": False,
    }
    await db.set_ce("ce", **spec)
    assert await logic.submit_pilot(db, "ce", "lhcb")


async def test_rules_of_another_version_are_ignored(sqlite_db: MyPilotDB) -> None:
    newer = {"max_waiting": 3, "moon": "full", "vos": {"lhcb": {"moon": "new", "share": 2}}}
    await sqlite_db.add_ce("ce", 2, 1.0, rules=newer)
    rules = (await logic.get_ce(sqlite_db, "ce"))["rules"]
    assert (rules["max_waiting"], rules["vos"]["lhcb"]["share"]) == (3, 2)
    assert "moon" not in rules
    assert await request_pilots(sqlite_db, "lhcb", vos=["lhcb"]) == {"ce": 2}


async def test_a_failing_cancellation_does_not_prevent_polls(db: MyPilotDB, scripted: Any) -> None:
    await db.add_ce("ce", 9, 1.0, backend="scripted")
    scripted.submissions["ce"] = SubmitOutcome(reference="job.1")
    pilot_id = await logic.submit_pilot(db, "ce", "lhcb")
    scripted.cancellations["ce"] = PermissionError("not your job")
    scripted.observations["ce"] = Observation(Observed.RUNNING)
    await logic.cancel_pilot(db, pilot_id, by="alice")
    assert await logic.transition_pilot_states(db, "lhcb") == {MyPilotStatus.RUNNING: 1}
    assert "not your job" in (await db.get_ce("ce"))["last_error"]


async def test_a_successful_poll_closes_the_circuit_although_a_cancellation_fails(
    db: MyPilotDB, scripted: Any, time: Clock
) -> None:
    await db.add_ce("ce", 9, 1.0, backend="scripted", rules=RULES | {"breaker_failures": 1})
    scripted.submissions["ce"] = SubmitOutcome(reference="job.1")
    pilot_id = await logic.submit_pilot(db, "ce", "lhcb")
    scripted.cancellations["ce"] = PermissionError("not your job")
    scripted.observations["ce"] = Observation(Observed.WAITING)
    await logic.cancel_pilot(db, pilot_id, by="alice")
    assert await circuit(db, CECall.STATUS) == ("open", 1)
    time.passes(60)
    await logic.transition_pilot_states(db, "lhcb")
    assert await circuit(db, CECall.STATUS) == ("closed", 0)
    assert "not your job" in (await db.get_ce("ce"))["last_error"]
    assert await logic.submit_pilot(db, "ce", "lhcb")


async def test_a_successful_poll_does_not_clear_the_error_of_submissions(db: MyPilotDB, scripted: Any) -> None:
    await db.add_ce("ce", 9, 1.0, backend="scripted")
    scripted.submissions["ce"] = SubmitOutcome(reference="job.1")
    await logic.submit_pilot(db, "ce", "lhcb")
    scripted.submissions["ce"] = SubmitOutcome(error="queue closed")
    await refused(db)
    scripted.observations["ce"] = Observation(Observed.WAITING)
    await logic.transition_pilot_states(db, "lhcb")
    assert (await db.get_ce("ce"))["last_error"] == "queue closed"


async def test_a_slow_ce_does_not_delay_the_responses_of_others(db: MyPilotDB, scripted: Any) -> None:
    for name, backend in (("slow", "scripted"), ("well", "simulated")):
        await db.add_ce(name, 1, 1.0, backend=backend)
    scripted.submissions["slow"] = SubmitOutcome(reference="job.1")
    slow, well = [await logic.submit_pilot(db, name, "lhcb") for name in ("slow", "well")]
    scripted.observations["slow"] = gate = asyncio.Event()
    check = asyncio.create_task(logic.transition_pilot_states(db, "lhcb", prompt_seconds=0.01))
    await until(lambda: db.get_pilot(well), when=lambda pilot: pilot["status"] is MyPilotStatus.RUNNING)
    assert not check.done()
    gate.set()
    assert await check == {MyPilotStatus.RUNNING: 1}
    assert (await db.get_pilot(slow))["missing_since"] is not None


async def test_during_a_slow_poll_the_pilots_of_other_ces_are_polled_every_cycle(
    db: MyPilotDB, scripted: Any
) -> None:
    for name, backend in (("slow", "scripted"), ("well", "simulated"), ("later", "simulated")):
        await db.add_ce(name, 1, 1.0, backend=backend)
    scripted.submissions["slow"] = SubmitOutcome(reference="job.1")
    scripted.observations["slow"] = gate = asyncio.Event()
    slow, well = [await logic.submit_pilot(db, name, "lhcb") for name in ("slow", "well")]
    check = asyncio.create_task(logic.transition_pilot_states(db, "lhcb", prompt_seconds=0.01, cycle_seconds=0))

    async def is_done(pilot: int) -> None:
        await until(lambda: db.get_pilot(pilot), when=lambda found: found["status"] is MyPilotStatus.DONE)

    await is_done(well)
    await is_done(await logic.submit_pilot(db, "later", "lhcb"))  # submitted while the check was under way
    assert not check.done()
    # It is not asked again for all that, and what it says in the end counts.
    assert scripted.calls.count(("slow", "poll")) == 1
    gate.set()
    assert await check == {MyPilotStatus.RUNNING: 2, MyPilotStatus.DONE: 2}
    assert (await db.get_pilot(slow))["missing_since"] is not None
    assert await logic.count_illegal_histories(db) == 0


async def test_a_time_out_is_a_rule_of_the_ce(db: MyPilotDB, scripted: Any) -> None:
    await db.add_ce("ce", 9, 1.0, backend="scripted", rules={"timeout_seconds": 0.05})
    scripted.submissions["ce"] = asyncio.Event()
    with pytest.raises(CERefusedError, match=r"no response within 0\.05 s"):
        await logic.submit_pilot(db, "ce", "lhcb")


async def test_a_banned_ce_is_not_called_and_a_closed_one_is_drained(db: MyPilotDB, scripted: Any) -> None:
    await db.add_ce("ce", 9, 1.0, backend="scripted")
    scripted.submissions["ce"] = SubmitOutcome(reference="job.1")
    scripted.observations["ce"] = Observation(Observed.RUNNING)
    pilot_id = await logic.submit_pilot(db, "ce", "lhcb")
    scripted.calls.clear()
    assert await logic.ban_ce(db, "ce", reason="maintenance")
    assert not await logic.ban_ce(db, "ce", reason="long maintenance")
    assert (await logic.get_ce(db, "ce"))["ban_reason"] == "long maintenance"
    assert await logic.transition_pilot_states(db, "lhcb") == {}
    await logic.cancel_pilot(db, pilot_id, by="alice")
    assert await request_pilots(db, "lhcb", vos=["lhcb"]) == {}
    assert scripted.calls == []
    assert await logic.set_ce_enabled(db, "ce", False)
    assert await logic.transition_pilot_states(db, "lhcb") == {MyPilotStatus.RUNNING: 1}
    assert scripted.calls == [("ce", "cancel"), ("ce", "poll")]
    assert await request_pilots(db, "lhcb", vos=["lhcb"]) == {}
    assert await logic.set_ce_enabled(db, "ce", True)
    assert await request_pilots(db, "lhcb", vos=["lhcb"]) == {"ce": 8}


async def test_enabling_or_changing_a_ce_ends_its_pause(db: MyPilotDB, scripted: Any) -> None:
    spec = {"capacity": 3, "success_rate": 1.0, "backend": "scripted"}
    scripted.submissions["ce"] = SubmitOutcome(error="no such queue")
    rules: dict[str, Any] = {"breaker_failures": 1}
    await db.set_ce("ce", **spec, rules=rules)
    for mended in (logic.set_ce_enabled(db, "ce", True), db.set_ce("ce", **spec, rules=rules | {"share": 2})):
        await refused(db)
        await paused(db)
        await mended
        assert await circuit(db, CECall.SUBMIT) == ("closed", 0)


async def test_a_resumed_submission_that_is_refused_keeps_its_slot_until_the_checks(
    sqlite_db: MyPilotDB, scripted: Any
) -> None:
    db = sqlite_db
    await db.add_ce("ce", 3, 1.0, backend="scripted")
    stamp = "0" * 32
    pilot_id = await db.submit_pilot("ce", "lhcb", stamp=stamp)  # and then the worker died, before or after
    scripted.submissions["ce"] = SubmitOutcome(error="quota exceeded")
    with pytest.raises(CERefusedError):
        await logic.submit_pilot(db, "ce", "lhcb", stamp=stamp)
    scripted.observations["ce"] = Observation(Observed.WAITING, reference="job.1")
    await logic.transition_pilot_states(db, "lhcb")
    assert (await db.get_pilot(pilot_id))["reference"] == "job.1"
    assert await logic.submit_pilot(db, "ce", "lhcb", stamp=stamp) == pilot_id
    assert scripted.calls == [("ce", "submit"), ("ce", "poll")]


async def test_a_vo_without_settings_does_not_pause_other_vos(
    db: MyPilotDB, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "no pilot script for dteam"
    monkeypatch.setattr(scripted, "unsupported_reason", lambda _, vo: reason if vo == "dteam" else None)
    scripted.submissions["ce"] = SubmitOutcome(reference="job.1")
    await db.add_ce("ce", 9, 1.0, backend="scripted", rules=RULES)
    for _ in range(3):
        with pytest.raises(CERefusedError, match=reason):
            await logic.submit_pilot(db, "ce", "dteam")
    assert (await db.get_ce("ce"))["last_error"] == reason
    assert scripted.calls == []
    assert await circuit(db, CECall.SUBMIT) == ("closed", 0)
    await logic.submit_pilot(db, "ce", "lhcb")
    assert (await db.search_pilots(vo=None))[0] == 1
