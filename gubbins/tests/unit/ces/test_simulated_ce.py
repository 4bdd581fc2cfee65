"""Back end `simulated`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from gubbins.ces import CEDescription, Observed, PilotAtCE, make_backend
from gubbins.domain.exceptions import CESettingsError
from gubbins.domain.pilot_states import MyPilotStatus


def backend(success_rate: float = 0.5, **settings: Any) -> Any:
    return make_backend("simulated", CEDescription("ce", 10, success_rate), settings)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_the_success_rate_is_used(rate: float) -> None:
    ce = backend(rate)
    share = sum(ce.will_succeed(f"stamp{i}") for i in range(5000)) / 5000
    assert share == pytest.approx(rate, abs=0.03)
    assert share == rate or 0 < rate < 1


def test_success_depends_on_seed_and_stamp_alone() -> None:
    stamps = [f"stamp{i}" for i in range(200)]
    fates = [[backend(seed=seed).will_succeed(s) for s in stamps] for seed in (1, 1, 2)]
    assert fates[0] == fates[1] != fates[2]


async def test_a_pilot_waits_runs_and_ends_by_the_clock() -> None:
    ce = backend(1.0, queue_seconds=60, run_seconds=60)
    now = datetime.now(tz=UTC)
    old = now - timedelta(seconds=120)
    waiting = PilotAtCE("a", "vo", submitted_at=now)
    ready = PilotAtCE("b", "vo", submitted_at=old)
    running = PilotAtCE("c", "vo", status=MyPilotStatus.RUNNING, submitted_at=old, started_at=now)
    ended = PilotAtCE("d", "vo", status=MyPilotStatus.RUNNING, submitted_at=old, started_at=old)
    cancelled = PilotAtCE("e", "vo", submitted_at=now, cancel_requested=True)
    seen = await ce.poll([waiting, ready, running, ended, cancelled])
    assert {stamp: o.state for stamp, o in seen.items()} == {
        "a": Observed.WAITING,
        "b": Observed.RUNNING,
        "c": Observed.RUNNING,
        "d": Observed.DONE,
        "e": Observed.FAILED,
    }
    assert seen["e"].reason == "cancelled"


def test_unknown_settings_and_back_ends_are_refused() -> None:
    with pytest.raises(CESettingsError, match=r"settings\.speed: unknown field; there are seed"):
        backend(speed=1)
    with pytest.raises(CESettingsError, match="installed are"):
        make_backend("nope", CEDescription("ce", 1, 1.0), {})
