"""Commands of the back ends in a shell, and the values in them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gubbins import ces
from gubbins.ces.processes.backend import quote

SHELLS = [shell for shell in ("dash", "bash", "busybox") if shutil.which(shell)]


def run(shell: str, text: bytes, home: Path) -> subprocess.CompletedProcess[bytes]:
    argv = [shell, "sh", "-s"] if shell == "busybox" else [shell, "-s"]
    environment = {"HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin"}
    return subprocess.run(argv, input=text, env=environment, capture_output=True, check=False, timeout=60)


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_reads_quoted_values_unchanged(shell: str, tmp_path: Path) -> None:
    @settings(deadline=None, max_examples=50)
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
    def check(value: str) -> None:
        response = run(shell, f'value={quote(value)}\nprintf %s "$value"\n'.encode(), tmp_path)
        assert response.stdout.decode() == value.replace("\0", "")

    check()


def test_scripts_can_be_arguments_in_any_locale() -> None:
    """Python encodes the arguments of a process in that of the worker, which may be ASCII."""
    scripts = list(Path(ces.__path__[0]).rglob("*.sh"))
    assert scripts
    assert [script.name for script in scripts if not script.read_bytes().isascii()] == []
