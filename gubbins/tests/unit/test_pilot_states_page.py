"""The documentation of reasons why pilots failed is complete."""

from __future__ import annotations

import pytest
from support.paths import ROOT

from gubbins.domain.pilot_states import MyPilotStatus

PAGE = (ROOT / "docs/reference/pilot-states.md").read_text()
CES = ROOT / "gubbins/src/gubbins/ces"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("simulated.py", "simulated failure"),
        ("processes/backend.py", "the process vanished without an exit code"),
        ("processes/backend.py", "the pilot process was never started"),
        ("processes/backend.py", "the host was restarted while it ran"),
        ("arc/backend.py", "killed at the CE"),
        ("arc/backend.py", "removed by the CE before its end was seen"),
        ("arc/backend.py", "failed, and the CE gives no reason"),
        ("arc/rest.py", "not authorized: check that the CE allows this certificate or token"),
        ("transports/tokens.py", "does not hold a token"),
        ("htcondor/jobs.py", "put on hold (code "),
        ("htcondor/jobs.py", "interrupted on its node; it is not started a second time"),
        ("htcondor/jobs.py", "its files have never come to the schedd"),
        ("htcondor/jobs.py", "removed at the site: "),
        ("../logic/my_pilots/compute_elements.py", "quota of the site: "),
        ("../domain/pilot_states.py", "cancelled, for "),
        ("../logic/my_pilots/check.py", "unknown to its compute element since"),
    ],
)
def test_every_reason_of_a_back_end_is_documented(module: str, reason: str) -> None:
    assert reason in (CES / module).read_text(), "it is no longer given: take it from the page"
    assert reason in PAGE


def test_every_state_is_documented() -> None:
    for state in MyPilotStatus:
        assert f"\n| {state} | " in PAGE
