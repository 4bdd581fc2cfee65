"""The demo with a real Slurm, and its error without one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from support.paths import ROOT

from examples.demo.slurm import SlurmSite

COMMAND = [sys.executable, "-m", "examples.demo", "--site", "slurm"]


@pytest.mark.timeout(240)
def test_demo_keeps_a_slurm_site_full_and_leaves_nothing_behind(tmp_path: Path) -> None:
    if (obstacle := SlurmSite.obstacle()) is not None:
        pytest.skip(obstacle)
    assert entry_points(group="gubbins.ces", name="slurm"), "`make install` again: there is a new entry point"
    log = tmp_path / "log"
    with log.open("w") as file:
        demo = subprocess.Popen([*COMMAND, "--json"], cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True)
        try:
            deadline = time.monotonic() + 150
            while not re.search(r"[1-9]\d* RUNNING, .*slurm 16/16", log.read_text()):
                assert demo.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            demo.send_signal(signal.SIGINT)
            output, _ = demo.communicate(timeout=40)
        finally:
            demo.kill()
    assert demo.returncode == 0, log.read_text()
    report = json.loads(output.splitlines()[-1])
    assert report["ces"] == {"slurm": {"capacity": 16, "max_active_seen": 16}}
    assert sum(states["RUNNING"] + states["DONE"] for states in report["pilots"].values()) > 0
    assert report["illegal_transitions"] == 0
    found = re.search(r"logs: (\S+)", log.read_text())
    assert found
    assert not Path(found[1]).exists()
    left = subprocess.run(["pgrep", "-f", found[1]], check=False, capture_output=True, text=True)
    assert left.stdout == ""


def test_demo_reports_a_missing_slurm_in_one_line() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DIRACX_")}
    # A user who may not start the daemons, or does not have them, gets an error that says so.
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import os; os.geteuid = lambda: 1000\n"
            "import runpy, sys; sys.argv = ['demo', '--site', 'slurm']\n"
            "runpy.run_module('examples.demo', run_name='__main__')",
        ],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Slurm" in done.stderr
    assert done.stdout == ""
