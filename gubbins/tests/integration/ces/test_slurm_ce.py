"""The back end `slurm` at a real site."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from sites.sshd import Sshd

from examples.demo.slurm import SlurmSite
from gubbins.ces import CEDescription
from gubbins.ces.slurm import SlurmBackend, SlurmSettings
from gubbins.ces.transports.ssh import SSHHost
from gubbins.testing.ce_conformance import CERemoteConformance, MakeBackend, Scenario, pilot_scripts

pytestmark = pytest.mark.event_loops("uvloop")


class TestSlurm(CERemoteConformance):
    timeout_seconds = 20.0

    @pytest.fixture
    def ssh(self) -> SSHHost | None:
        return None

    @pytest.fixture
    def make(self, slurm_site: SlurmSite, ssh: SSHHost | None, tmp_path: Path) -> MakeBackend:
        self.witness = tmp_path / "witness"
        self.witness.mkdir()
        scripts = pilot_scripts(self.witness)

        def make(scenario: Scenario) -> SlurmBackend:
            settings = SlurmSettings(
                ssh=ssh,
                directory=tmp_path / "pilots",
                slurm_conf=slurm_site.slurm_conf,
                default_script=scripts[scenario],
                timeout_seconds=self.timeout_seconds,
                keep="all",
            )
            return SlurmBackend(CEDescription("slurm", 100, 1.0), settings)

        return make

    @pytest.fixture
    def down(self, slurm_site: SlurmSite) -> AbstractContextManager[object]:
        return self.impatiently(slurm_site.without_controller())

    @pytest.fixture
    def hanging(self, slurm_site: SlurmSite) -> AbstractContextManager[object]:
        return self.impatiently(slurm_site.frozen())

    @contextmanager
    def impatiently(self, disturbance: AbstractContextManager[object]) -> Iterator[None]:
        self.timeout_seconds = 1.0
        with disturbance:
            yield
        del self.timeout_seconds

    def starts(self, stamp: str) -> int:
        return len((self.witness / stamp).read_text().splitlines())


class TestSlurmThroughSSH(TestSlurm):
    """The same promises when the commands are on another host."""

    @pytest.fixture
    def ssh(self, sshd: Sshd) -> SSHHost | None:
        return SSHHost(**sshd.settings)

    @pytest.fixture
    def down(self, sshd: Sshd) -> AbstractContextManager[object]:
        return sshd.down()
