"""Truncated batch scripts."""

from __future__ import annotations

import subprocess
from pathlib import Path

from gubbins.ces import PilotAtCE
from gubbins.ces.slurm import SlurmSettings
from gubbins.ces.slurm.batch import batch_script


def test_a_truncated_batch_script_runs_nothing(tmp_path: Path) -> None:
    script = "".join(f"touch {tmp_path}/ran{number}\n" for number in range(20))
    settings = SlurmSettings(directory=tmp_path / "pilots", default_script=script)
    (tmp_path / "pilots" / "s").mkdir(parents=True)
    text = batch_script(settings, "ce", PilotAtCE("s", "vo"))
    environment = {"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path), "SLURM_JOB_ID": "1"}

    def run(part: bytes) -> int:
        (tmp_path / "batch").write_bytes(part)
        command = ["/bin/sh", str(tmp_path / "batch")]
        return subprocess.run(command, env=environment, check=False, capture_output=True, timeout=60).returncode

    for cut in [*range(300, len(text) - 2, 101), len(text) - 2]:
        assert run(text[:cut]) != 0, text[:cut]
    assert not list(tmp_path.glob("ran*"))
    assert not (tmp_path / "pilots" / "s" / "started").exists()
    assert run(text) == 0
    assert len(list(tmp_path.glob("ran*"))) == 20
