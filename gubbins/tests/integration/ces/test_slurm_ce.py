"""Back end `slurm` with a real Slurm."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from support.pilot_secrets import URL, Place, assert_only_the_pilot_can_read_its_secret
from support.pilot_waiters import ENDED, observe
from support.recorded_starts import PilotDirectories, RecordedStarts
from support.sites.sshd import Sshd

from examples.demo.slurm import SlurmSite
from gubbins.ces import CEDescription, Observed, PilotAtCE, PilotIdentity
from gubbins.ces.slurm import SlurmBackend, SlurmSettings
from gubbins.ces.transports.shell import Completed, LocalShell, inherited_environment
from gubbins.ces.transports.ssh import SSHHost
from gubbins.domain.exceptions import CEUnavailableError
from gubbins.testing.ce_conformance import (
    CERemoteConformance,
    CESiteConformance,
    MakeBackend,
    Scenario,
)

pytestmark = pytest.mark.event_loops("uvloop")


class TestSlurm(PilotDirectories, CERemoteConformance):
    timeout_seconds = 20.0
    pause_seconds = 0.25  # each poll starts programs
    many = 20

    @pytest.fixture
    def ssh(self) -> SSHHost | None:
        return None

    @pytest.fixture
    def make(self, slurm_site: SlurmSite, ssh: SSHHost | None, tmp_path: Path) -> MakeBackend:
        scripts = self.scripts(tmp_path)

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
        return self.with_short_timeouts(slurm_site.without_controller())

    @pytest.fixture
    def hanging(self, slurm_site: SlurmSite) -> AbstractContextManager[object]:
        return self.with_short_timeouts(slurm_site.frozen())

    @pytest.fixture
    def secondary_source_down(self, tmp_path: Path) -> AbstractContextManager[object]:
        """The directories of the pilots are away."""

        @contextmanager
        def away() -> Iterator[None]:
            there = tmp_path / "pilots"
            there.rename(tmp_path / "away")
            there.touch()
            try:
                yield
            finally:
                there.unlink()
                (tmp_path / "away").rename(there)

        return away()

    @pytest.fixture
    def holding(self, slurm_site: SlurmSite) -> AbstractContextManager[object]:
        @contextmanager
        def partition_down() -> Iterator[None]:
            slurm_site.command("scontrol", "update", "PartitionName=short", "State=DOWN")
            try:
                yield
            finally:
                slurm_site.command("scontrol", "update", "PartitionName=short", "State=UP")

        return partition_down()

    @contextmanager
    def with_short_timeouts(self, disturbance: AbstractContextManager[object]) -> Iterator[None]:
        self.timeout_seconds = 1.0
        with disturbance:
            yield
        del self.timeout_seconds


class TestSlurmThroughSSH(TestSlurm):
    """The same promises when the commands are on another host, where tcsh prints at each log-in."""

    many = 10

    @pytest.fixture
    def ssh(self, csh_sshd: Sshd) -> SSHHost | None:
        return SSHHost(**csh_sshd.settings)

    @pytest.fixture
    def unreadable(self) -> None:
        """Not supported: the node has its own mounts, and does not see those of the test."""

    @pytest.fixture
    def uncertain(self) -> None:
        """Not supported, as `unreadable`."""

    @pytest.fixture
    def down(self, csh_sshd: Sshd) -> AbstractContextManager[object]:
        return csh_sshd.down()


class PlainAccount(LocalShell):
    """Runs commands as a user who is not an operator of the site."""

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float) -> Completed:
        plain = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        return await super().run([*plain, *argv], stdin=stdin, timeout=timeout)


class TestHiddenPartition(RecordedStarts, CESiteConformance):
    """The same promises in a partition that the site hides from all but its operators."""

    many = 10
    pause_seconds = 0.25

    @pytest.fixture
    def make(self, slurm_site: SlurmSite) -> Iterator[MakeBackend]:
        directory = Path(tempfile.mkdtemp(prefix="gubbins-hidden-"))  # which the plain account can enter
        slurm_site.directory.chmod(0o755)
        slurm_site.command("scontrol", "update", "PartitionName=short", "Hidden=YES")
        directory.chmod(0o777)
        scripts = self.scripts(directory)
        self.witness.chmod(0o777)
        shell = PlainAccount(inherited_environment() | {"SLURM_CONF": str(slurm_site.slurm_conf)})

        def make(scenario: Scenario) -> SlurmBackend:
            settings = SlurmSettings(directory=directory / "pilots", default_script=scripts[scenario], keep="all")
            return SlurmBackend(CEDescription("slurm", 100, 1.0), settings, shell)

        try:
            yield make
        finally:
            slurm_site.command("scontrol", "update", "PartitionName=short", "Hidden=NO")
            slurm_site.directory.chmod(0o700)
            shutil.rmtree(directory, ignore_errors=True)  # a job may be writing there


class TestClusters(RecordedStarts, CESiteConformance):
    """The same promises at a site of several clusters, whose `sbatch` responses `number;cluster`."""

    many = 10
    pause_seconds = 0.25

    @pytest.fixture
    def make(self, accounting_slurm_site: SlurmSite, tmp_path: Path) -> MakeBackend:
        scripts = self.scripts(tmp_path)

        def make(scenario: Scenario) -> SlurmBackend:
            settings = SlurmSettings(
                directory=tmp_path / "pilots",
                slurm_conf=accounting_slurm_site.slurm_conf,
                clusters="private",
                default_script=scripts[scenario],
                keep="all",
            )
            return SlurmBackend(CEDescription("slurm", 100, 1.0), settings)

        return make

    @pytest.fixture
    def full(self, accounting_slurm_site: SlurmSite) -> AbstractContextManager[object]:
        @contextmanager
        def limited() -> Iterator[None]:
            limit = ("sacctmgr", "-i", "modify", "user", "root", "set")
            accounting_slurm_site.command(*limit, "maxsubmitjobs=1")
            try:
                yield
            finally:
                accounting_slurm_site.command(*limit, "maxsubmitjobs=-1")

        return limited()

    async def test_a_cluster_that_only_sbatch_reported_is_polled(
        self, accounting_slurm_site: SlurmSite, tmp_path: Path
    ) -> None:
        commands = tmp_path / "commands"
        commands.mkdir()
        for name, option in (("sbatch", "-Mprivate"), ("squeue", ""), ("scancel", "")):
            warn = 'echo "sh: warning: setlocale: LC_ALL: cannot change locale" >&2'
            (commands / name).write_text(
                f'#!/bin/sh\n{warn}\necho "$@" >> {tmp_path}/{name}\nexec {name} {option} "$@"\n'
            )
            (commands / name).chmod(0o755)
        conf = accounting_slurm_site.slurm_conf
        settings = SlurmSettings(
            directory=tmp_path / "pilots", slurm_conf=conf, commands=commands, default_script="sleep 300"
        )
        backend, pilot = SlurmBackend(CEDescription("slurm", 9, 1.0), settings), PilotAtCE("s", "vo")
        reference = (await backend.submit([pilot]))["s"].reference
        assert str(reference).endswith(";private")
        pilot = pilot._replace(reference=reference)
        await observe(backend, pilot, Observed.RUNNING)
        await backend.cancel([pilot])
        await observe(backend, pilot, Observed.FAILED)
        for name in ("squeue", "scancel"):
            assert "--clusters=private" in (tmp_path / name).read_text()

    async def test_an_unavailable_cluster_is_not_an_empty_queue(
        self, accounting_slurm_site: SlurmSite, tmp_path: Path
    ) -> None:
        conf = accounting_slurm_site.slurm_conf
        settings = SlurmSettings(directory=tmp_path, slurm_conf=conf, clusters="private,nowhere")
        backend = SlurmBackend(CEDescription("slurm", 100, 1.0), settings)
        with pytest.raises(CEUnavailableError, match="squeue: No cluster 'nowhere' known by database"):
            await backend.poll([PilotAtCE("s", "vo", reference="1;nowhere")])
        (tmp_path / "s").mkdir()
        (tmp_path / "s" / "tried").touch()
        with pytest.raises(CEUnavailableError, match="No cluster 'nowhere' known by database"):
            await backend.submit([PilotAtCE("s", "vo")])


async def test_only_the_pilot_can_read_its_secret(
    slurm_site: SlurmSite, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"directory": str(tmp_path / "ce"), "slurm_conf": str(slurm_site.slurm_conf)}
    await assert_only_the_pilot_can_read_its_secret(Place("slurm", settings, slurm_site.directory), caplog)


async def test_the_secret_is_not_in_job_information_of_slurm(slurm_site: SlurmSite, tmp_path: Path) -> None:
    word = secrets.token_urlsafe(32)
    settings = {"directory": str(tmp_path), "slurm_conf": str(slurm_site.slurm_conf)}
    async with Place("slurm", settings, tmp_path).open() as backend:
        pilot = PilotAtCE(uuid.uuid4().hex, "vo", identity=PilotIdentity(URL, word))
        reference = (await backend.submit([pilot]))[pilot.stamp].reference
        output = slurm_site.command("scontrol", "show", "job", "-dd", str(reference))
        assert pilot.stamp in output
        assert word not in output
        await observe(backend, pilot, *ENDED)
