"""The back end `ssh`: a real sshd, real processes, and no memory but the directories on the host."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError
from sites.sshd import Sshd

from gubbins.ces import CEDescription, Observation, Observed, PilotAtCE
from gubbins.ces.ssh import SSHBackend, SSHSettings
from gubbins.ces.ssh import backend as backend_module
from gubbins.exceptions import CEUnavailableError, OutputUnavailableError
from gubbins.pilot_states import MyPilotStatus
from gubbins.testing.ce_conformance import CERemoteConformance, Fate, MakeBackend, pilot_scripts

ENDED = (Observed.DONE, Observed.FAILED)
Make = Callable[..., SSHBackend]


class TestConformance(CERemoteConformance):
    pause_seconds: ClassVar[float] = 0.05

    @pytest.fixture
    def make(self, sshd: Sshd, tmp_path: Path) -> MakeBackend:
        self.witness = tmp_path / "witness"
        self.witness.mkdir()
        scripts = pilot_scripts(self.witness)
        settings = sshd.settings | {"connect_timeout_seconds": 3, "command_timeout_seconds": 5}

        def make(fate: Fate) -> SSHBackend:
            return SSHBackend(
                CEDescription("host", 100, 1.0),
                SSHSettings(**settings, workdir=str(tmp_path / "pilots"), default_script=scripts[fate], keep="all"),
            )

        return make

    @pytest.fixture
    def down(self, sshd: Sshd) -> AbstractContextManager[object]:
        return sshd.down()

    @pytest.fixture
    def hanging(self, sshd: Sshd) -> AbstractContextManager[object]:
        return sshd.frozen()

    def starts(self, stamp: str) -> int:
        return len((self.witness / stamp).read_text().splitlines())
