"""Back end `slurm` with accounting (slurmdbd)."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from support.pilot_waiters import ENDED, observe
from support.sites.slurm import AccountingSlurmSite
from support.waiting import until

from gubbins.ces import CEDescription, Observed, PilotAtCE
from gubbins.ces.slurm import SlurmBackend, SlurmSettings

pytestmark = pytest.mark.event_loops("uvloop")


async def test_the_end_of_a_job_that_slurm_has_removed_is_read_from_the_accounting(
    accounting_slurm_site: AccountingSlurmSite, tmp_path: Path
) -> None:
    site = accounting_slurm_site

    def make(script: str = "true", *, accounting: bool = True) -> SlurmBackend:
        settings = SlurmSettings(
            directory=tmp_path / "pilots",
            slurm_conf=site.slurm_conf,
            nodes_see_directory=False,
            accounting=accounting,
            default_script=script,
        )
        return SlurmBackend(CEDescription("slurm", 4, 1.0), settings)

    good, bad, killed, never = (PilotAtCE(uuid.uuid4().hex, "vo") for _ in range(4))
    await make().submit([good])
    await make("exit 3").submit([bad])
    await make("sleep 600").submit([killed])
    await observe(make(), killed, Observed.RUNNING)
    site.command("scancel", f"--name={killed.stamp}")
    for pilot in (good, bad, killed):
        await observe(make(), pilot, *ENDED)
    stamps = (good.stamp, bad.stamp, killed.stamp)
    await until(
        lambda: not any(stamp in site.command("squeue", "-h", "-t", "all", "-o", "%j") for stamp in stamps)
    )
    seen = await make().poll([good, bad, killed, never])
    assert {stamp: observation[:2] for stamp, observation in seen.items()} == {
        good.stamp: (Observed.DONE, None),
        bad.stamp: (Observed.FAILED, "exit code 3"),
        killed.stamp: (Observed.FAILED, "cancelled at the site (CANCELLED)"),
    }
    running = PilotAtCE(uuid.uuid4().hex, "vo")
    await make("sleep 600").submit([running])
    await observe(make(), running, Observed.RUNNING)
    with site.without_accounts():
        backend = make()
        seen = await backend.poll([good, bad, killed, never, running])
        assert seen.pop(running.stamp).state is Observed.RUNNING
        assert {each.state for each in seen.values()} == {Observed.NO_NEWS}
        assert "sacct: " in str(backend.warning)
    await observe(make(), good, Observed.DONE)
    await make().cancel([running])
    assert await make(accounting=False).poll([good, bad, killed, never]) == {}
