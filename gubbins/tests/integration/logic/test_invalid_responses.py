"""Invalid responses of a compute element are recorded there and do not delay the pilots of others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from gubbins.ces import Observation, Observed, PilotAtCE, SubmitOutcome
from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.exceptions import CEPausedError, CERefusedError
from gubbins.logic import my_pilots as logic

S = MyPilotStatus
RUNNING = Observed.RUNNING
ACCEPTED = SubmitOutcome(reference="job.1")
RULES = {"breaker_failures": 2}
Response = Callable[[str], Any]
"""Make a response to a poll."""


@pytest.fixture
def response_with(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Response], None]:
    """`response_with("poll", response)`: what the compute element `mad` returns for that call."""

    def install(method: str, response: Response) -> None:
        sane = getattr(scripted, method)

        async def call(self: Any, pilots: Sequence[PilotAtCE]) -> Any:
            if self.ce.name != "mad":
                return await sane(self, pilots)
            self.calls.append(("mad", method))
            [pilot] = pilots
            return response(pilot.stamp)

        monkeypatch.setattr(scripted, method, call)

    return install


async def pilots_of(db: MyPilotDB, scripted: Any, *names: str) -> list[int]:
    for name in names:
        await db.add_ce(name, 9, 1.0, backend="scripted", rules=RULES)
        scripted.submissions[name] = ACCEPTED
        scripted.observations[name] = Observation(RUNNING)
    return [await logic.submit_pilot(db, name, "lhcb") for name in names]


async def breaker_state(db: MyPilotDB, call: CECall, name: str = "mad") -> tuple[str, int, str]:
    """State, failures and last words of a circuit."""
    circuit = (await db.get_ce(name))["circuits"][call]
    return str(circuit["state"]), circuit["failures"], str(circuit["last_error"])


def broken_off(_: str) -> Any:
    raise asyncio.CancelledError


async def a_poll_counts_and_the_others_move_on(
    db: MyPilotDB, scripted: Any, response_with: Any, response: Response, said: str
) -> None:
    [well] = await pilots_of(db, scripted, "well")
    await db.add_ce("mad", 9, 1.0, backend="scripted", rules=RULES)
    mad = await db.submit_pilot("mad", "lhcb")  # its reference is not known yet
    response_with("poll", response)
    assert await logic.transition_pilot_states(db, "lhcb") == {S.RUNNING: 1}
    assert (await db.get_pilot(well))["status"] is S.RUNNING
    pilot = await db.get_pilot(mad)
    assert (pilot["status"], pilot["reference"], pilot["missing_since"]) == (S.SUBMITTED, None, None)
    state, failures, words = await breaker_state(db, CECall.STATUS)
    assert (state, failures) == ("closed", 1)
    assert said in words
    assert await breaker_state(db, CECall.STATUS, "well") == ("closed", 0, "None")

    scripted.observations["well"] = Observation(Observed.DONE)
    assert await logic.transition_pilot_states(db, "lhcb") == {S.DONE: 1}
    assert (await breaker_state(db, CECall.STATUS))[:2] == ("open", 2)
    polls = scripted.calls.count(("mad", "poll"))
    await logic.transition_pilot_states(db, "lhcb")
    assert scripted.calls.count(("mad", "poll")) == polls


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (lambda _: None, "invalid response: nothing in place of"),
        (lambda _: [7], "invalid response: a value of type list in place of"),
        (lambda _: 7, "invalid response: a value of type int in place of"),
        (lambda stamp: {stamp: None}, "invalid response: None in place of"),
        (lambda stamp: {stamp: "RUNNING"}, "invalid response: 'RUNNING' in place of"),
        (lambda stamp: {stamp: Observation("RUNNING")}, "invalid response: Observation(state='RUNNING'"),
        (lambda stamp: {stamp: Observation(RUNNING, 7)}, "invalid response: 7 in place of a reason"),
        (lambda stamp: {stamp: Observation(RUNNING, None, 7)}, "invalid response: 7 in place of the reference"),
        (broken_off, "its back end was cancelled"),
    ],
)
async def test_an_invalid_poll_response_is_a_failure_of_its_ce_only(
    sqlite_db: MyPilotDB, scripted: Any, response_with: Any, response: Response, said: str
) -> None:
    await a_poll_counts_and_the_others_move_on(sqlite_db, scripted, response_with, response, said)


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (lambda stamp: {stamp: Observation(RUNNING, None, "x" * 300)}, "a reference of 300 characters"),
        (lambda stamp: {stamp: Observation(RUNNING, None, "job\0")}, r"'job\x00' in place of the reference"),
        (lambda stamp: {stamp: Observation(RUNNING, None, "job\ud800")}, r"'job\ud800' in place of the reference"),
    ],
)
async def test_an_invalid_reference_is_a_failure_of_its_ce_only(
    db: MyPilotDB, scripted: Any, response_with: Any, response: Response, said: str
) -> None:
    await a_poll_counts_and_the_others_move_on(db, scripted, response_with, response, said)


async def test_a_reference_of_255_characters_is_stored(db: MyPilotDB, scripted: Any, response_with: Any) -> None:
    await db.add_ce("mad", 9, 1.0, backend="scripted")
    pilots = [await db.submit_pilot("mad", "lhcb")]
    response_with("poll", lambda stamp: {stamp: Observation(RUNNING, None, "ü" * 255)})
    assert await logic.transition_pilot_states(db, "lhcb") == {S.RUNNING: 1}
    response_with("submit", lambda stamp: {stamp: SubmitOutcome("🚀" * 255)})
    pilots.append(await logic.submit_pilot(db, "mad", "lhcb"))
    assert [(await db.get_pilot(pilot))["reference"] for pilot in pilots] == ["ü" * 255, "🚀" * 255]


WORDS = "no\0 more\ud800\nthan that\x1b: " + "x" * 5000
BEGIN = "no more than that : xxx"


async def test_a_reason_is_stored_and_readable_for_any_text(db: MyPilotDB, scripted: Any) -> None:
    pilots = await pilots_of(db, scripted, "ce", "well")
    await logic.transition_pilot_states(db, "lhcb")
    scripted.observations["ce"] = Observation(Observed.FAILED, WORDS)
    scripted.observations["well"] = Observation(Observed.FAILED, "🚀\0")
    assert await logic.transition_pilot_states(db, "lhcb") == {S.FAILED: 2}
    seen = [await logic.get_pilot(db, pilot) for pilot in pilots]
    for pilot, begin in zip(seen, (BEGIN, "🚀"), strict=True):
        reason = pilot["history"][-1]["reason"]
        assert reason == pilot["last_error"]
        assert reason.startswith(begin)
        assert reason.isprintable()
    assert (await logic.search_pilots(db, vo="lhcb"))[0] == 2


async def test_errors_and_ban_reasons_are_readable_for_any_text(db: MyPilotDB, scripted: Any) -> None:
    [pilot] = await pilots_of(db, scripted, "ce")
    scripted.observations["ce"] = ConnectionError(WORDS)
    await logic.transition_pilot_states(db, "lhcb")
    assert (await breaker_state(db, CECall.STATUS, "ce"))[2].startswith(BEGIN)
    scripted.observations["ce"] = Observation(RUNNING)
    await logic.transition_pilot_states(db, "lhcb")
    scripted.cancellations["ce"] = ConnectionError(WORDS)
    await logic.cancel_pilot(db, pilot, by="alice")
    await logic.transition_pilot_states(db, "lhcb")
    assert f"cannot cancel 1 pilots: {BEGIN}" in (await logic.get_ce(db, "ce"))["last_error"]
    await logic.ban_ce(db, "ce", reason=WORDS)
    [ce] = await logic.list_ces(db)
    assert ce["ban_reason"].startswith(BEGIN)


@pytest.mark.parametrize("response", [SubmitOutcome(error=WORDS), ConnectionError(WORDS)])
async def test_the_error_of_a_submission_is_readable_for_any_text(
    db: MyPilotDB, scripted: Any, response: Any
) -> None:
    await db.add_ce("ce", 9, 1.0, backend="scripted")
    scripted.submissions["ce"] = response
    with pytest.raises(CERefusedError, match=BEGIN) as refused:
        await logic.submit_pilot(db, "ce", "lhcb")
    assert str(refused.value).isprintable()
    assert (await breaker_state(db, CECall.SUBMIT, "ce"))[2].startswith(BEGIN)


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (lambda _: None, "invalid response: nothing in place of"),
        (lambda _: ["job.1"], "invalid response: a value of type list in place of"),
        (lambda _: {}, "did not respond about the pilot"),
        (lambda stamp: {stamp: None}, "did not respond about the pilot"),
        (lambda stamp: {stamp: "job.1"}, "invalid response: 'job.1' in place of"),
        (lambda stamp: {stamp: SubmitOutcome(7)}, "invalid response: 7 in place of the reference"),
        (lambda stamp: {stamp: SubmitOutcome("")}, "invalid response: '' in place of the reference"),
        (lambda stamp: {stamp: SubmitOutcome("x" * 300)}, "a reference of 300 characters"),
        (lambda stamp: {stamp: SubmitOutcome("job\0")}, r"'job\x00' in place of the reference"),
        (lambda stamp: {stamp: SubmitOutcome(error=7)}, "invalid response: 7 in place of a reason"),
    ],
)
async def test_an_invalid_submission_response_keeps_the_slot_and_opens_the_circuit(
    sqlite_db: MyPilotDB, scripted: Any, response_with: Any, response: Response, said: str
) -> None:
    db = sqlite_db
    await db.add_ce("mad", 9, 1.0, backend="scripted", rules=RULES)
    scripted.observations["mad"] = Observation(RUNNING, None, "job.1")
    response_with("submit", response)
    for _ in range(2):
        with pytest.raises(CERefusedError) as refused:
            await logic.submit_pilot(db, "mad", "lhcb")
        assert said in str(refused.value)
        assert str(refused.value).endswith("the next checks will find out")
    state, failures, words = await breaker_state(db, CECall.SUBMIT)
    assert (state, failures) == ("open", 2)
    assert said in words
    with pytest.raises(CEPausedError):
        await logic.submit_pilot(db, "mad", "lhcb")
    assert scripted.calls.count(("mad", "submit")) == 2
    assert await logic.transition_pilot_states(db, "lhcb") == {S.RUNNING: 2}


@pytest.mark.parametrize("hangs", [True, False])
async def test_a_connection_that_cannot_be_closed_does_not_discard_the_response(
    sqlite_db: MyPilotDB,
    scripted: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    hangs: bool,
) -> None:
    async def close(_: Any) -> None:
        if hangs:
            await asyncio.Event().wait()
        raise ConnectionError("reset\0by peer")

    monkeypatch.setattr(scripted, "close", close)
    monkeypatch.setattr(scripted, "close_seconds", 0.01)
    with caplog.at_level(logging.WARNING):
        async with asyncio.timeout(100):
            [pilot] = await pilots_of(sqlite_db, scripted, "ce")
            assert await logic.transition_pilot_states(sqlite_db, "lhcb") == {S.RUNNING: 1}
            await logic.cancel_pilot(sqlite_db, pilot, by="alice")
    assert scripted.cancelled
    for call in CECall:
        assert await breaker_state(sqlite_db, call, "ce") == ("closed", 0, "None")
    words = "no end within 0.01 s" if hangs else "reset by peer"
    assert f"Cannot close the connections to ce: {words}" in caplog.text


async def test_an_error_while_closing_does_not_hide_the_first_error(
    sqlite_db: MyPilotDB, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def close(_: Any) -> None:
        raise ConnectionError("not open")

    monkeypatch.setattr(scripted, "close", close)
    await pilots_of(sqlite_db, scripted, "ce")
    scripted.observations["ce"] = ConnectionError("no route to host")
    await logic.transition_pilot_states(sqlite_db, "lhcb")
    assert (await breaker_state(sqlite_db, CECall.STATUS, "ce"))[2] == "no route to host"


async def test_the_reason_why_settings_do_not_support_a_vo_is_stored_as_one_short_line(
    db: MyPilotDB, scripted: Any, install_backend: Any
) -> None:
    class Unwilling(scripted):  # type: ignore[misc]  # a class that a fixture made
        def unsupported_reason(self, vo: str) -> str:
            return f"no token\0 of {vo}:\n\ud800" + "x" * 100_000

    install_backend("unwilling", Unwilling)
    await db.add_ce("ce", 9, 1.0, backend="unwilling")
    with pytest.raises(CERefusedError, match="no token of lhcb: x"):
        await logic.submit_pilot(db, "ce", "lhcb")
    message = (await db.get_ce("ce"))["last_error"]
    assert message.startswith("no token of lhcb: x")
    assert len(message) <= 1024
