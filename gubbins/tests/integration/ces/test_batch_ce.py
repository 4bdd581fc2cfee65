"""Back end `batch` with a real Grid Engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from support.pilot_secrets import Place, assert_only_the_pilot_can_read_its_secret
from support.pilot_waiters import observe
from support.recorded_starts import PilotDirectories
from support.sites.gridengine import GridEngineSite
from support.sites.sshd import Sshd

from gubbins.ces import CEDescription, Observed, PilotAtCE
from gubbins.ces.batch import BatchBackend, BatchSettings
from gubbins.domain.exceptions import CEUnavailableError
from gubbins.testing.ce_conformance import CERemoteConformance, MakeBackend, Scenario

pytestmark = [pytest.mark.event_loops("uvloop"), pytest.mark.timeout(240)]


class TestGridEngine(PilotDirectories, CERemoteConformance):
    timeout_seconds = 20.0
    deadline_seconds = 180  # busy, it may take over a minute to end a job that has just started
    many = 10
    pause_seconds = 0.25  # each poll starts programs

    @pytest.fixture
    def make(self, gridengine_site: GridEngineSite, tmp_path: Path) -> MakeBackend:
        scripts = self.scripts(tmp_path)

        def make(scenario: Scenario) -> BatchBackend:
            return make_backend(
                gridengine_site, tmp_path, default_script=scripts[scenario], timeout_seconds=self.timeout_seconds
            )

        return make

    @pytest.fixture
    def down(self, gridengine_site: GridEngineSite) -> AbstractContextManager[object]:
        return self.with_short_timeouts(gridengine_site.down())

    @pytest.fixture
    def hanging(self, gridengine_site: GridEngineSite) -> AbstractContextManager[object]:
        return self.with_short_timeouts(gridengine_site.frozen())

    @pytest.fixture
    def holding(self, gridengine_site: GridEngineSite) -> AbstractContextManager[object]:
        return gridengine_site.holding()

    @pytest.fixture
    def full(self, gridengine_site: GridEngineSite) -> AbstractContextManager[object]:
        return gridengine_site.full()

    @contextmanager
    def with_short_timeouts(self, disturbance: AbstractContextManager[object]) -> Iterator[None]:
        with disturbance:
            self.timeout_seconds = 1.0
            yield
            del self.timeout_seconds


def make_backend(site: GridEngineSite, directory: Path, **settings: object) -> BatchBackend:
    values = {"system": "gridengine", "directory": directory / "pilots", "keep": "all", **settings}
    return BatchBackend(CEDescription("batch", 100, 1.0), BatchSettings.model_validate(values), site)


async def test_a_refusal_of_grid_engine_has_its_message(gridengine_site: GridEngineSite, tmp_path: Path) -> None:
    for settings, words in (
        ({"queue": "nowhere"}, 'Job was rejected because job requests unknown queue "nowhere"'),
        ({"extra_options": ["-l", "no_such=1"]}, "unknown resource"),
        ({"extra_options": ["-no-such-option"]}, "invalid option argument"),
    ):
        backend = make_backend(gridengine_site, tmp_path, **settings)
        outcome = (await backend.submit([PilotAtCE("s", "vo")]))["s"]
        assert words in str(outcome.error), outcome
        assert not outcome.quota
        assert not (tmp_path / "pilots" / "s").exists()


async def test_a_job_that_is_submitted_with_a_warning_is_found_by_its_name(
    gridengine_site: GridEngineSite, tmp_path: Path
) -> None:
    backend, pilot = make_backend(gridengine_site, tmp_path), PilotAtCE("s", "vo")
    gridengine_site.command("qconf", "-au", "root", "unwanted")
    gridengine_site.command("qconf", "-rattr", "queue", "xuser_lists", "unwanted", "pilots")
    try:
        with pytest.raises(CEUnavailableError, match="not allowed to run in any queue"):
            await backend.submit([pilot])
        seen = await observe(backend, pilot, Observed.WAITING)
        assert (await backend.submit([pilot]))["s"].reference == seen.reference
        await backend.cancel([pilot])
        assert (await observe(backend, pilot, Observed.FAILED)).reason == "cancelled"
    finally:
        gridengine_site.command("qconf", "-rattr", "queue", "xuser_lists", "NONE", "pilots")


async def test_an_account_in_which_bsub_is_quiet_can_submit(csh_sshd: Sshd, tmp_path: Path) -> None:
    (tmp_path / "bsub").write_text(
        "#!/bin/sh\n[ -n \"${BSUB_QUIET+set}\" ] || echo 'Job <7> is submitted to queue <q>.'\n"
    )
    (tmp_path / "bsub").chmod(0o755)
    settings = {"system": "lsf", "directory": tmp_path / "pilots", "commands": tmp_path, "ssh": csh_sshd.settings}
    backend = BatchBackend(CEDescription("lsf", 9, 1.0), BatchSettings.model_validate(settings))
    assert (await backend.submit([PilotAtCE("s", "vo")]))["s"].reference == "7"
    await backend.close()


async def test_only_the_pilot_can_read_its_secret(
    gridengine_site: GridEngineSite, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"directory": str(tmp_path / "ce"), "system": "gridengine"}
    await assert_only_the_pilot_can_read_its_secret(Place("batch", settings, tmp_path, gridengine_site), caplog)
