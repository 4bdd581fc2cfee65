"""Conformance tests of back ends that need no site."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.recorded_starts import PilotDirectories

from gubbins.ces import CEDescription
from gubbins.ces.local import LocalBackend, LocalSettings
from gubbins.ces.simulated import SimulatedBackend, SimulatedSettings
from gubbins.testing.ce_conformance import CEConformance, CESiteConformance, MakeBackend, Scenario

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")


class TestSimulated(CEConformance):
    pause_seconds = 0

    @pytest.fixture
    def make(self) -> MakeBackend:
        def make(scenario: Scenario) -> SimulatedBackend:
            settings = SimulatedSettings(run_seconds=3600 if scenario is Scenario.LONG else 0)
            return SimulatedBackend(CEDescription("sim", 100, float(scenario is not Scenario.FAILING)), settings)

        return make


class TestLocal(PilotDirectories, CESiteConformance):
    pause_seconds = 0.02

    @pytest.fixture
    def make(self, tmp_path: Path) -> MakeBackend:
        scripts = self.scripts(tmp_path)

        def make(scenario: Scenario) -> LocalBackend:
            settings = LocalSettings(directory=tmp_path / "pilots", default_script=scripts[scenario], keep="all")
            return LocalBackend(CEDescription("local", 100, 1.0), settings)

        return make
