"""The script of batch jobs with full disks: a pilot that has not run must not look like one without work."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from gubbins.ces.protocol import PilotAtCE
from gubbins.ces.slurm.batch import batch_script
from gubbins.ces.slurm.settings import SlurmSettings


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Directory of the pilot, whose script is longer than the limit of files in `run_with_limit`."""
    script = f": > {tmp_path}/ran\n" + "# words\n" * 1_000
    settings = SlurmSettings(directory=tmp_path, scripts={"vo": script})
    (tmp_path / "script.sh").write_bytes(batch_script(settings, "ce", PilotAtCE("stamp", "vo")))
    (tmp_path / "stamp").mkdir()
    return tmp_path / "stamp"


def run_with_limit(job: Path, blocks: int) -> int:
    """Run the job with files of at most so many blocks: writing more fails as on a full disk."""
    command = f"trap '' XFSZ; ulimit -f {blocks}; exec /bin/sh script.sh"
    env = os.environ | {"SLURM_JOB_ID": "17", "TMPDIR": str(job.parent)}
    return subprocess.run(["/bin/sh", "-c", command], check=False, cwd=job.parent, env=env).returncode


def test_an_incomplete_pilot_script_is_not_run(job: Path) -> None:
    assert run_with_limit(job, 1) == 126
    assert (job / "rc").read_text() == "126\n"
    assert not (job.parent / "ran").exists()


def test_a_job_that_cannot_record_its_start_fails(job: Path) -> None:
    assert run_with_limit(job, 0) == 1
    assert not (job.parent / "ran").exists()
    (job / "started").unlink()
    assert run_with_limit(job, 1_000) == 0
    assert (job.parent / "ran").exists()


@pytest.mark.parametrize(("number", "code"), [("16", 0), ("17", 1)], ids=["another", "requeued"])
def test_a_second_job_of_the_same_pilot_is_not_run(job: Path, number: str, code: int) -> None:
    (job / "started").write_text(f"{number}\n")
    assert run_with_limit(job, 1_000) == code
    assert not (job.parent / "ran").exists()
    assert (job / "rc").exists() == (number == "17")


@pytest.mark.parametrize("restarts", ["0", "1"])
def test_a_requeued_job_is_not_run_on_nodes_without_its_directory_either(
    job: Path, restarts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    script = job.parent / "script.sh"
    script.write_text(re.sub(r"^job=.*", "job=", script.read_text(), flags=re.MULTILINE))
    assert run_with_limit(job, 1_000) == int(restarts)
    assert (job.parent / "ran").exists() == (restarts == "0")
