"""Settings of a compute element that differ for each VO: account, credentials, queue."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import pytest
from support.moving_clock import Clock

from gubbins.ces import CEBackend, Observation, Observed, PilotAtCE, PilotOutput, SubmitOutcome
from gubbins.ces.protocol import CESettings
from gubbins.db.sql import MyPilotDB
from gubbins.domain.circuit_breaker import CECall, CircuitState
from gubbins.domain.exceptions import CEPausedError, CEQuotaError
from gubbins.health import find_alerts
from gubbins.logic import my_pilots as logic
from gubbins.logic.my_pilots import CEFileError, parse_ce_file

VOS = ("lhcb", "dteam", "gridpp")


class AccountSettings(CESettings):
    account: str
    nodes: int = 1


class AccountBackend(CEBackend[AccountSettings]):
    """Notes which account each call is made with."""

    Settings = AccountSettings
    calls: ClassVar[list[tuple[str, str, list[str]]]] = []

    expired: ClassVar[str] = ""  # account
    full: ClassVar[str] = ""

    def _note(self, call: str, pilots: Sequence[PilotAtCE]) -> None:
        if self.settings.account == self.expired:
            raise PermissionError("the proxy has expired")
        self.calls.append((call, self.settings.account, sorted({pilot.vo for pilot in pilots})))

    async def submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        self._note("submit", pilots)
        full = SubmitOutcome(error="enough", quota=True) if self.settings.account == self.full else None
        return {pilot.stamp: full or SubmitOutcome(reference=pilot.stamp) for pilot in pilots}

    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        self._note("poll", pilots)
        return {pilot.stamp: Observation(Observed.DONE) for pilot in pilots}

    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        self._note("cancel", pilots)

    async def output(self, pilot: PilotAtCE) -> PilotOutput:
        self._note("output", [pilot])
        return PilotOutput("", "")

    async def cleanup(self, pilots: Sequence[PilotAtCE]) -> None:
        self._note("cleanup", pilots)


FILE = """
compute_elements:
  - name: ce
    capacity: 50
    backend: account
    settings: {nodes: 2, account: shared}
    vos: {lhcb: {account: prod}, dteam: {account: test, nodes: 1}, gridpp: {}}
"""
ACCOUNTS = {"lhcb": "prod", "dteam": "test", "gridpp": "shared"}


@pytest.fixture(autouse=True)
def backend(install_backend: Any) -> type[AccountBackend]:
    install_backend("account", AccountBackend)
    AccountBackend.calls.clear()
    AccountBackend.expired = AccountBackend.full = ""
    return AccountBackend


async def test_every_call_is_made_with_the_settings_of_the_vo(
    sqlite_db: MyPilotDB, backend: type[AccountBackend]
) -> None:
    db = sqlite_db
    await logic.load_ces(db, parse_ce_file(FILE))
    assert (await logic.get_ce(db, "ce"))["vos"] == ["lhcb", "dteam", "gridpp"]
    for vo in VOS:
        pilot = await logic.submit_pilot(db, "ce", vo)
        await logic.cancel_pilot(db, pilot, by="alice")
        for _ in range(2):
            await logic.transition_pilot_states(db, vo)
        await logic.collect_outputs(db, vo)
    made = {(call, vo): account for call, account, [vo] in backend.calls}
    assert made == {
        (call, vo): ACCOUNTS[vo] for vo in VOS for call in ("submit", "poll", "cancel", "output", "cleanup")
    }


async def test_requests_of_vos_with_other_credentials_are_not_submitted_in_the_same_call(
    sqlite_db: MyPilotDB, backend: type[AccountBackend]
) -> None:
    db = sqlite_db
    await logic.load_ces(db, parse_ce_file(FILE))
    stamps = {vo: (await db.add_requests(vo, {"ce": 3}))["ce"] for vo in VOS}
    pilots = [
        await logic.submit_requested_pilot(db, "ce", vo, stamp=stamp)
        for vo, own in stamps.items()
        for stamp in own
    ]
    assert len(set(pilots)) == 9
    assert None not in pilots
    assert backend.calls == [("submit", ACCOUNTS[vo], [vo]) for vo in VOS]


async def test_vos_without_their_own_settings_are_combined(
    sqlite_db: MyPilotDB, backend: type[AccountBackend]
) -> None:
    db = sqlite_db
    await db.add_ce("ce", 50, 1.0, backend="account", settings={"account": "shared"}, vos=VOS)
    stamps = {vo: (await db.add_requests(vo, {"ce": 2}))["ce"] for vo in VOS}
    await logic.submit_requested_pilot(db, "ce", "lhcb", stamp=stamps["lhcb"][0])
    assert backend.calls == [("submit", "shared", sorted(VOS))]


@pytest.mark.parametrize("call", ["status", "submit"])
async def test_expired_credentials_of_a_vo_stop_no_other_vo(
    db: MyPilotDB, backend: type[AccountBackend], time: Clock, call: str
) -> None:
    await logic.load_ces(db, parse_ce_file(FILE))
    await logic.submit_pilot(db, "ce", "lhcb")
    backend.expired = "prod"

    async def make_call() -> None:
        if call == "status":
            await logic.transition_pilot_states(db, "lhcb")
        else:
            with contextlib.suppress(logic.PilotSubmissionError):
                await logic.submit_pilot(db, "ce", "lhcb")

    async def requests(vo: str) -> bool:
        requested = await logic.request_pilots(db, vo, vos=VOS)
        for name, stamps in requested.items():
            await logic.withdraw_requests(db, name, stamps)
        return requested != {}

    for _ in range(7):  # a pause until 240 s has begun
        await make_call()
        time.at += timedelta(seconds=30)
    assert not await requests("lhcb")
    # The polls of the other VO clear nothing for this one, nor do its failures stop anything there.
    for _ in range(2):
        assert await requests("dteam")
        await logic.submit_pilot(db, "ce", "dteam")
        assert await logic.transition_pilot_states(db, "dteam")
        assert not await requests("lhcb")
        await make_call()
    for vo, failing in (("lhcb", True), ("dteam", False), (None, True)):
        [ce] = await logic.list_ces(db, vo)
        assert (ce["circuits"][call]["state"] != "closed") is failing, vo
        assert "the proxy has expired" in ce["last_error"]
        named = f"{ce['circuits'][call]['last_error']}".startswith("VO lhcb: the proxy has expired")
        assert named is (vo is None), "the operator sees whose failures these are"
    # The next probe finds out that the credentials were renewed, although the other VO has pilots and requests.
    backend.expired = ""
    time.at += timedelta(minutes=16)
    await db.add_requests("dteam", {"ce": 1})
    await logic.transition_pilot_states(db, "lhcb")
    assert await requests("lhcb")
    await logic.submit_pilot(db, "ce", "lhcb")
    assert (await logic.get_ce(db, "ce"))["circuits"][call]["failures"] == 0


async def test_the_quota_of_a_vo_limits_no_other_vo(
    db: MyPilotDB, backend: type[AccountBackend], time: Clock
) -> None:
    await logic.load_ces(db, parse_ce_file(FILE))
    for vo in ("lhcb", "lhcb", "dteam"):
        await logic.submit_pilot(db, "ce", vo)
    backend.full = "prod"
    with pytest.raises(CEQuotaError, match="quota of the site: 2"):
        await logic.submit_pilot(db, "ce", "lhcb")

    async def requests(vo: str) -> int:
        [stamps] = (await logic.request_pilots(db, vo, vos=[vo])).values() or [[]]
        await logic.withdraw_requests(db, "ce", stamps)
        return len(stamps)

    assert [await requests(vo) for vo in VOS] == [0, 47, 47]
    await logic.submit_pilot(db, "ce", "dteam")
    time.at += timedelta(minutes=3)
    # A tenth more, but at least one, for each minute: 5, of which it has 2.
    assert [await requests(vo) for vo in VOS] == [3, 46, 46]
    backend.full = ""
    [stamp, *_] = (await db.add_requests("lhcb", {"ce": 9}))["ce"]
    await logic.submit_requested_pilot(db, "ce", "lhcb", stamp=stamp)
    assert await db.count_active("ce", "lhcb") == 5


async def test_the_quota_of_a_vo_stays_when_another_vo_reaches_its_own(
    db: MyPilotDB, backend: type[AccountBackend], time: Clock
) -> None:
    await logic.load_ces(db, parse_ce_file(FILE))
    for number, vo in enumerate(("lhcb", "dteam")):
        for _ in range(number):
            await logic.submit_pilot(db, "ce", vo)
        backend.full = ACCOUNTS[vo]
        time.at += timedelta(seconds=1)
        with pytest.raises(CEQuotaError, match=f"quota of the site: {number}"):
            await logic.submit_pilot(db, "ce", vo)
    for vo in ("lhcb", "dteam"):
        with pytest.raises(CEPausedError, match="quota of the site"):
            await logic.submit_pilot(db, "ce", vo)
    [ce] = await logic.list_ces(db)
    assert ce["last_error"] == "quota of the site: 1", "the last one"
    await logic.set_ce_enabled(db, "ce", True)
    backend.full = ""
    for vo in VOS:
        await logic.submit_pilot(db, "ce", vo)


async def test_of_the_circuits_of_vos_administrators_see_the_one_with_the_longest_pause(
    sqlite_db: MyPilotDB, backend: type[AccountBackend], time: Clock
) -> None:
    await logic.load_ces(sqlite_db, parse_ce_file(FILE))
    breaker = {"failures": 9, "pause_seconds": 60, "max_pause_seconds": 600}
    for vo, pause in (("lhcb", 0), ("dteam", 300), ("gridpp", 0), ("gridpp", 0)):
        await sqlite_db.record_failure("ce", CECall.SUBMIT, vo, **breaker, requested_pause_seconds=pause, vo=vo)
    [ce] = await logic.list_ces(sqlite_db)
    circuit = ce["circuits"][CECall.SUBMIT]
    assert (circuit["state"], circuit["last_error"]) == (CircuitState.OPEN, "VO dteam: dteam")
    assert [alert.check for alert in find_alerts([ce], {})] == ["ce_circuit_open"]


def test_a_setting_of_every_vo_needs_no_common_value() -> None:
    [spec] = parse_ce_file(FILE.replace(", account: shared", "").replace(", gridpp: {}", ""))
    assert spec.vos == ["lhcb", "dteam"]


@pytest.mark.parametrize(
    ("vos", "path"),
    [
        ("{lhcb: {account: [1]}}", "vos.lhcb.account"),
        ("{lhcb: {}, dteam: {nods: 1}}", "vos.dteam.nods"),
        ("{}", "vos"),
        ("{lhcb: prod}", "vos"),
        ("{lhcb: }", "vos"),
    ],
)
def test_an_error_in_the_settings_of_a_vo_is_reported_with_its_path(vos: str, path: str) -> None:
    document = (
        f"compute_elements: [{{name: ce, capacity: 1, backend: account, settings: {{account: a}}, vos: {vos}}}]"
    )
    with pytest.raises(CEFileError) as caught:
        parse_ce_file(document)
    assert list(dict(caught.value.problems)) == [f"compute_elements[0].{path}"]
