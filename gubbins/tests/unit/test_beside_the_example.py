"""Refusal to be installed beside DiracX's example extension, which has modules of the same names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gubbins


@pytest.mark.parametrize("beside", ["in one place", "before it", "behind it", "not there"])
def test_the_package_refuses_an_installed_example_extension(tmp_path: Path, beside: str) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    here = Path(gubbins.__file__).parent
    shutil.copytree(
        here, ours / "gubbins", ignore=shutil.ignore_patterns("__pycache__", "cli", "ces", "dashboard")
    )
    if beside != "not there":  # it is a namespace package
        core = (ours if beside == "in one place" else theirs) / "gubbins" / "core"
        core.mkdir(parents=True)
        (core / "__init__.py").touch()
    places = [theirs, ours] if beside == "before it" else [ours, theirs]
    done = subprocess.run(
        [sys.executable, "-c", "import gubbins.domain.pilot_states"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    if beside == "not there":
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.stderr.splitlines()[-1].startswith(
            "ImportError: gubbins-pilots and DiracX's example extension"
        )
