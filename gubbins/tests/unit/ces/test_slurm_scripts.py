"""Shell scripts of the back end `slurm`, with hostile pilots."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gubbins.ces import directories, slurm
from gubbins.ces.slurm.backend import NUMBER

FOLDERS = {"submit": slurm, "records": slurm, "output": directories, "cleanup": directories}
SECRET = "the owner's secret"


def run(name: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    text = Path(str(FOLDERS[name].__file__)).with_name(f"{name}.sh").read_text()
    argv = ["/bin/sh", "-c", text, name, *arguments]
    given = f"\n{stdin}" if name == "submit" else stdin  # no secret
    return subprocess.run(argv, input=given, capture_output=True, text=True, timeout=20, check=False)


def _link(path: Path) -> None:
    (path.parent.parent / "secret").write_text(SECRET)
    path.symlink_to(path.parent.parent / "secret")


def _endless(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk


@pytest.mark.parametrize(
    "put", [_link, os.mkfifo, Path.mkdir, _endless], ids=["link", "fifo", "directory", "endless"]
)
@pytest.mark.parametrize("name", ["id", "rc", "stderr", "stdout", "cancelled", "ended"])
def test_files_of_a_pilot_cannot_block_or_mislead_a_read(
    tmp_path: Path, put: Callable[[Path], None], name: str
) -> None:
    for stamp in ("hostile", "well"):
        (tmp_path / stamp).mkdir()
        for each, text in (("id", "7"), ("rc", "3"), ("stderr", "no luck\n")):
            (tmp_path / stamp / each).write_text(text + "\n")
    (tmp_path / "hostile" / name).unlink(missing_ok=True)
    put(tmp_path / "hostile" / name)
    records = run("records", str(tmp_path), stdin="hostile\nwell\nunknown\n").stdout
    shown = "".join(run("output", str(tmp_path), "hostile", each, "1000").stdout for each in ("stdout", "stderr"))
    cleaned = run("cleanup", str(tmp_path), "", ".", stdin="cancelled hostile\nended hostile\n")
    known = run("submit", str(tmp_path), "well", "5", "s,^[0-9]*$,&,p", "false", "false").stdout
    assert "well|7|3||no luck" in records
    assert SECRET not in records + shown
    assert len(shown) <= 2_000
    assert cleaned.returncode == 0
    assert known == "7\n"
    if put is _link:
        assert (tmp_path / "secret").read_text() == SECRET


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("4711", "4711"),
        ("4711;mpp2", "4711;mpp2"),
        ("Submitted batch job 4711", "4711"),
        ("Submitted batch job 4711 on cluster mpp2", "4711;mpp2"),
        ("Welcome\r\n4711\r\n55 jobs\r", "4711"),
        ("Submitted batch job", ""),
        ("123_4", ""),
        ("123+0", ""),
        ("4711.batch", ""),
        ("-7", ""),
    ],
)
def test_output_of_sbatch_of_any_version_is_a_job_number_or_none(said: str, number: str) -> None:
    done = subprocess.run(["sed", "-n", NUMBER], input=f"{said}\n", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == number


@pytest.mark.parametrize("name", ["lock", "tried"])
def test_a_directory_that_takes_no_more_files_is_named_and_nothing_is_submitted(tmp_path: Path, name: str) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / name).symlink_to(tmp_path / "nowhere" / "x")
    done = run("submit", str(tmp_path), "s", "5", NUMBER, "true", "touch", str(tmp_path / "called"))
    assert done.returncode == 73
    assert name in done.stderr
    assert not (tmp_path / "called").exists()


def test_a_directory_that_cannot_be_created_has_the_reason_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("in its place")
    done = run("submit", str(tmp_path), "s", "5", NUMBER, "true", "false")
    assert done.returncode == 73
    assert "File exists" in done.stderr


def test_a_job_that_starts_at_once_and_records_its_number_first_does_not_disturb_its_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    mv = tmp_path / "bin" / "mv"
    mv.write_text('#!/bin/sh\necho 7 > s/id.new && /bin/mv s/id.new s/id && exec /bin/mv "$@"\n')
    mv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{mv.parent}:{os.environ['PATH']}")
    done = run("submit", str(tmp_path), "s", "5", NUMBER, "true", "echo", "Submitted batch job 7")
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr


def test_very_many_pilots_are_polled_by_one_command(tmp_path: Path) -> None:
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "rc").write_text("0\n")
    stamps = [f"{number:032x}" for number in range(30_000)]
    assert run("records", str(tmp_path), stdin="\n".join([*stamps, "last"]) + "\n").stdout == "last||0||\n"
    assert run("records", str(tmp_path)).stdout == ""


def test_time_limits_are_understood_in_locales_with_decimal_commas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    flock = tmp_path / "bin" / "flock"
    # As flock of util-linux, which reads numbers as its locale has them.
    refuse = 'echo "flock: invalid timeout value: $2" >&2; exit 64'
    flock.write_text(f'#!/bin/sh\n[ "$LC_ALL" = C ] || {{ {refuse}; }}\nexec {shutil.which("flock")} "$@"\n')
    flock.chmod(0o755)
    monkeypatch.setenv("PATH", f"{flock.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    done = run("submit", str(tmp_path), "s", "2.5", NUMBER, "true", "echo", "7")
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr
