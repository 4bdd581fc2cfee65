"""The page that says why a pilot failed has the words that a VO manager reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from gubbins.domain.pilot_states import MyPilotStatus

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/reference/pilot-states.md").read_text()
CES = ROOT / "gubbins/src/gubbins/ces"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("simulated/backend.py", "simulated failure"),
        ("protocol.py", "the process vanished without an exit code"),
        ("local/job.py", "the pilot process was never started"),
        ("ssh/backend.py", "the pilot process was never started"),
        ("ssh/backend.py", "the host was restarted while it ran"),
        ("arc/backend.py", "killed at the CE"),
        ("arc/backend.py", "removed by the CE before its end was seen"),
        ("arc/backend.py", "failed, and the CE does not say why"),
        ("arc/rest.py", "it does not know us: see that the CE allows this certificate or token"),
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
def test_a_reason_that_a_back_end_gives_is_explained(module: str, reason: str) -> None:
    assert reason in (CES / module).read_text(), "it is no longer given: take it from the page"
    assert reason in PAGE


def test_every_state_is_explained() -> None:
    for state in MyPilotStatus:
        assert f"\n| {state} | " in PAGE
