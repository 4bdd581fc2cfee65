"""Mixins for conformance tests of back ends whose pilots record their starts on this machine."""

from __future__ import annotations

__all__ = ["PilotDirectories", "RecordedStarts"]

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from gubbins.testing.ce_conformance import Scenario, pilot_scripts
from support.sites.dead_mount import dead_mount, new_dead_mount


class RecordedStarts:
    """The starts of pilots, recorded by their scripts in a directory `witness`."""

    witness: Path

    def scripts(self, directory: Path) -> dict[Scenario, str]:
        """Scripts of pilots that record their starts below this directory."""
        self.witness = directory / "witness"
        self.witness.mkdir()
        return pilot_scripts(self.witness)

    def starts(self, stamp: str) -> int:
        return len((self.witness / stamp).read_text().splitlines())


class PilotDirectories(RecordedStarts):
    """Directories of pilots in `tmp_path / "pilots"`, which may be on a dead mount."""

    @pytest.fixture
    def unreadable(self, tmp_path: Path) -> Callable[[str], AbstractContextManager[object]]:
        return lambda stamp: dead_mount(tmp_path / "pilots" / stamp)

    @pytest.fixture
    def uncertain(self, tmp_path: Path) -> Callable[[str], AbstractContextManager[object]]:
        return lambda stamp: new_dead_mount(tmp_path / "pilots" / stamp)
