"""Signals to pilots: a cancellation is repeated, may come at any time, and is sent to all processes of a pilot."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from support.waiting import SECONDS

from gubbins.ces.batch import BatchSettings
from gubbins.ces.processes.backend import WRAPPER
from gubbins.ces.protocol import PilotAtCE, PilotIdentity
from gubbins.ces.settings import PILOT_SCRIPT
from gubbins.ces.slurm.batch import job_script

PAUSE_SECONDS = 0.002
VARIABLES = {"PILOT_STAMP": "stamp", "PILOT_VO": "vo", "PILOT_API_URL": "http://127.0.0.1:1"}


def prepare(wrapper: str, job: Path, payload: str) -> list[str]:
    """Write the files of the default pilot with an identity, as the back ends do; returns the command."""
    payloads = {"vo": payload} if payload else {}
    variables = VARIABLES | ({"PILOT_PAYLOAD": payload} if payload else {})
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    secret = job / ("work/.pilot-secret" if wrapper == "processes" else "secret")
    secret.parent.mkdir(parents=True, exist_ok=True)
    if wrapper != "slurm":  # whose script has it
        secret.write_text("secret")
    (job / "script").write_text(PILOT_SCRIPT)
    if wrapper == "processes":
        (job / "script").chmod(0o755)
        (job / "environment").write_text(exports)
        (job / "wrapper").write_text(WRAPPER)
        return [f"{job.name}/wrapper", job.name]
    settings = BatchSettings(system="pbs", directory=job.parent, payloads=payloads)
    identity = PilotIdentity(VARIABLES["PILOT_API_URL"], "secret")
    script = job_script(
        settings, "ce", PilotAtCE("stamp", "vo", identity=identity), job, number="17", id="17",
        output=' > "$job/stdout" 2> "$job/stderr"', shown_to_others=wrapper == "batch",
    )  # fmt: skip
    (job.parent / "job.sh").write_bytes(script)
    return ["job.sh"]


class SignalledPilot:
    """The default pilot with an identity, whose server refuses all connections, run by a wrapper."""

    def __init__(self, wrapper: str, job: Path, payload: str) -> None:
        command = prepare(wrapper, job, payload)
        self.job = job
        # Exists as soon as the pilot can be cancelled; batch systems cancel all jobs.
        self.first = "started" if wrapper in ("slurm", "batch") else "pid"
        self.process = subprocess.Popen(
            ["/bin/sh", *command],
            cwd=job.parent,
            start_new_session=True,
            env={"PATH": os.environ["PATH"], "TMPDIR": str(job.parent)},
        )
        self.deadline = time.monotonic() + SECONDS

    def wait_until_it_is_there(self) -> None:
        while not (self.job / self.first).exists():
            assert time.monotonic() < self.deadline, f"no {self.first}"
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
        return [str(path) for path in self.job.parent.rglob("*") if path.name.startswith((".pilot", "secret"))]


@pytest.fixture(params=["processes", "slurm", "batch"])
def wrapper(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("payload", ["sleep 600", ""])
@pytest.mark.parametrize("waited_ms", [0, 5, 20, 60, 200])
def test_repeated_signals_leave_an_exit_code_and_no_secret(
    wrapper: str, tmp_path: Path, payload: str, waited_ms: int
) -> None:
    pilot = SignalledPilot(wrapper, tmp_path / "job", payload)
    pilot.wait_until_it_is_there()
    time.sleep(waited_ms / 1000)  # the moment of the first signal is what differs
    pilot.signal_until_it_ends()
    assert (tmp_path / "job" / "rc").read_text().strip() not in ("", "0")
    assert pilot.left() == []


@pytest.mark.parametrize("wrapper", ["processes"])
def test_a_pilot_that_is_cancelled_before_its_start_never_runs(wrapper: str, tmp_path: Path) -> None:
    job = tmp_path / "job"
    job.mkdir()
    (job / "cancelled").touch()
    pilot = SignalledPilot(wrapper, job, "sleep 600")
    assert pilot.process.wait(SECONDS) == 0
    assert (job / "rc").read_text() == "143\n"
    assert pilot.left() == []
