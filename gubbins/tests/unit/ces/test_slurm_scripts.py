"""The shell scripts of the back end `slurm`, beside pilots that put anything into their directories."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gubbins.ces import slurm

SCRIPTS = Path(slurm.__file__).parent
SECRET = "the owner's secret"


def run(name: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    argv = ["/bin/sh", "-c", (SCRIPTS / f"{name}.sh").read_text(), name, *arguments]
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
def test_no_file_of_a_pilot_is_followed_waited_for_or_read_without_end(
    tmp_path: Path, put: Callable[[Path], None], name: str
) -> None:
    for stamp in ("hostile", "well"):
        (tmp_path / stamp).mkdir()
        for each, text in (("id", "7"), ("rc", "3"), ("stderr", "no luck\n")):
            (tmp_path / stamp / each).write_text(text + "\n")
    (tmp_path / "hostile" / name).unlink(missing_ok=True)
    put(tmp_path / "hostile" / name)
    looked = run("look", str(tmp_path), stdin="hostile\nwell\nunknown\n").stdout
    shown = "".join(run("output", str(tmp_path), "hostile", each, "1000").stdout for each in ("stdout", "stderr"))
    tidied = run("tidy", str(tmp_path), "", stdin="cancelled hostile\nended hostile\n")
    known = run("submit", str(tmp_path), "well", "5", "s,^[0-9]*$,&,p", "false", "false").stdout
    assert "well|7|3||no luck" in looked
    assert SECRET not in looked + shown
    assert len(shown) <= 2_000
    assert tidied.returncode == 0
    assert known == "7\n"
    if put is _link:
        assert (tmp_path / "secret").read_text() == SECRET


def test_very_many_pilots_are_polled_at_once(tmp_path: Path) -> None:
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "rc").write_text("0\n")
    stamps = [f"{number:032x}" for number in range(30_000)]
    assert run("look", str(tmp_path), stdin="\n".join([*stamps, "last"]) + "\n").stdout == "last||0||\n"
    assert run("look", str(tmp_path)).stdout == ""
