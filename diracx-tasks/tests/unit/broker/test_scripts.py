"""Sources of the Lua scripts."""

from __future__ import annotations

import pytest
from diracx.tasks.plumbing.broker import scripts


def test_a_process_reads_no_script_after_an_upgrade_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts of another version take other arguments, and while it is installed there are none."""
    scripts.Script("check")  # at the start of every process
    monkeypatch.delattr(scripts, "files")
    assert scripts.Script("leave").source
