"""Signals to pilots: a cancellation is repeated, may come at any time, and is sent to all processes of a pilot."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from support.waiting import SECONDS

from gubbins.ces.local.job import WRAPPER
from gubbins.ces.settings import PILOT_SCRIPT

PAUSE_SECONDS = 0.002


class SignalledPilot:
    """The default pilot with an identity, whose server refuses all connections."""

    def __init__(self, job: Path, payload: str) -> None:
        (job / "work").mkdir(parents=True)
        (job / "script").write_text(PILOT_SCRIPT)
        secret = job / "work" / ".pilot-secret"
        secret.write_text("secret")
        self.job = job
        self.process = subprocess.Popen(
            ["/bin/sh", WRAPPER, job],
            start_new_session=True,
            env={
                "PATH": os.environ["PATH"],
                "PILOT_STAMP": "stamp",
                "PILOT_VO": "vo",
                "PILOT_API_URL": "http://127.0.0.1:1",
                "PILOT_SECRET_FILE": str(secret),
                "PILOT_PAYLOAD": payload,
            },
        )
        self.deadline = time.monotonic() + SECONDS

    def wait_for(self, file: str) -> None:
        while not (self.job / file).exists():
            assert time.monotonic() < self.deadline, f"no {file}"
            time.sleep(PAUSE_SECONDS)

    def signal_until_it_ends(self) -> None:
        (self.job / "cancelled").touch()
        while self.process.poll() is None:
            assert time.monotonic() < self.deadline, "it goes on"
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)
            time.sleep(PAUSE_SECONDS)

    def left(self) -> list[str]:
        """Files that may have secrets."""
        return [str(path) for path in self.job.rglob("*") if path.name.startswith(".pilot")]


@pytest.mark.parametrize("payload", ["sleep 600", ""])
@pytest.mark.parametrize("waited_ms", [0, 5, 20, 50, 100, 200, 400])
def test_repeated_signals_leave_an_exit_code_and_no_secret(tmp_path: Path, payload: str, waited_ms: int) -> None:
    pilot = SignalledPilot(tmp_path / "job", payload)
    pilot.wait_for("pid")
    time.sleep(waited_ms / 1000)  # the moment of the first signal is what differs
    pilot.signal_until_it_ends()
    assert (tmp_path / "job" / "rc").read_text().strip() not in ("", "0")
    assert pilot.left() == []


def test_a_pilot_that_is_cancelled_before_its_start_never_runs(tmp_path: Path) -> None:
    job = tmp_path / "job"
    job.mkdir()
    (job / "cancelled").touch()
    pilot = SignalledPilot(job, "sleep 600")
    assert pilot.process.wait(SECONDS) == 0
    assert (job / "rc").read_text() == "143\n"
    assert pilot.left() == []
