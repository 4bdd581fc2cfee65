"""`make` runs what it runs with the Python that is asked for, and CI with every Python that is promised."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parents[3]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("there", "asked", "anew"),
    [
        ("3.12", "3.12", False),
        ("3.12", "3.13", True),
        ("3.12", None, False),  # what is there was asked for before
        ("broken", None, True),
        ("broken", "3.12", True),
        ("incomplete", "3.12", True),
    ],
)
def test_the_virtual_environment_follows_the_python_that_is_asked_for(
    tmp_path: Path, there: str, asked: str | None, anew: bool
) -> None:
    def python(path: Path, script: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    python(tmp_path / "venv/bin/python", "exit 127" if there == "broken" else f"echo {there.replace('in', '')}")
    if there != "incomplete":
        (tmp_path / "venv/.installed").touch()
    wanted = [] if asked is None else [f"PYTHON={python(tmp_path / 'python', f'echo {asked}')}"]
    command = ["make", "--dry-run", "install", f"VENV={tmp_path}/venv", *wanted]
    ours = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "PYTHON", "VENV")
    }
    done = subprocess.run(command, cwd=HERE, env=ours, check=True, capture_output=True, text=True)
    assert ("-m venv --clear" in done.stdout) == anew, done.stdout


def test_both_distributions_promise_the_same_pythons_and_this_is_one_of_them() -> None:
    pythons: dict[str, Any] = runpy.run_path(str(HERE / ".ci/pythons.py"))
    assert pythons["promised"]() == ["3.11", "3.12", "3.13"]
    assert set(pythons["found"]()) <= set(pythons["promised"]())
