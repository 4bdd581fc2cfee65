"""`make` uses the requested Python, and CI every supported one."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT


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
def test_the_virtual_environment_uses_the_requested_python(
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
    done = subprocess.run(command, cwd=ROOT, env=ours, check=True, capture_output=True, text=True)
    assert ("-m venv --clear" in done.stdout) == anew, done.stdout


def test_both_distributions_support_the_same_pythons() -> None:
    pythons: dict[str, Any] = runpy.run_path(str(ROOT / ".ci/pythons.py"))
    assert pythons["promised"]() == ["3.11", "3.12", "3.13"]
    assert set(pythons["found"]()) <= set(pythons["promised"]())
