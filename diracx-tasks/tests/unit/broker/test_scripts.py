"""Sources of the Lua scripts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from diracx.tasks.plumbing.broker import scripts


def test_a_process_reads_no_script_after_an_upgrade_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts of another version take other arguments, and while it is installed there are none."""
    scripts.Script("check")  # at the start of every process
    monkeypatch.delattr(scripts, "files")
    assert scripts.Script("leave").source


def test_scripts_are_read_in_any_locale() -> None:
    """In this one, Python reads text files as ASCII by default."""
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    code = "from diracx.tasks.plumbing.broker.scripts import Script; print(Script('check').sha)"
    read = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **ascii_only}, capture_output=True, text=True, check=False
    )
    assert (read.stdout.strip(), read.stderr) == (scripts.Script("check").sha, "")
