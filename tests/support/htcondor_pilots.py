"""Pilots of tests at a real HTCondor schedd: submit them, wait for them, and disturb their submission."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gubbins.ces import CEDescription, Observation, Observed, PilotAtCE
from gubbins.ces.htcondor import HTCondorBackend, HTCondorSettings
from gubbins.ces.htcondor.process import PROGRAM, Bindings
from gubbins.domain.exceptions import CEUnavailableError
from gubbins.domain.pilot_states import MyPilotStatus
from support.sites.htcondor import HTCondorSite
from support.waiting import until
from support.warm_bindings import WarmShell

_PAUSE_SECONDS = 0.7
"""Between two polls, each of which is a new Python."""


def make_backend(site: HTCondorSite, **settings: Any) -> HTCondorBackend:
    where = {"collector": site.collector, "schedd": site.schedd, "token": site.token}
    defaults = {"timeout_seconds": 60, "default_script": "true"}
    given = HTCondorSettings(**(where | defaults | settings))
    bindings = Bindings(given, shell=partial(WarmShell, site.bindings))
    return HTCondorBackend(CEDescription("ce", 100, 1.0), given, bindings)


def with_seconds(seconds: int, backend: HTCondorBackend, directory: Path) -> HTCondorBackend:
    """A back end whose schedd makes jobs for so many seconds after a submission."""
    constant = "_MATERIALIZE_SECONDS = "
    return changed(backend, directory, f"{constant}60", f"{constant}{seconds}")


def changed(backend: HTCondorBackend, directory: Path, old: str, new: str) -> HTCondorBackend:
    """A back end with another text in one place of the program that calls the bindings."""
    program = PROGRAM.read_text()
    assert program.count(old) == 1
    path = directory / "bindings.py"
    path.write_text(program.replace(old, new))
    return HTCondorBackend(backend.ce, backend.settings, Bindings(backend.settings, path))


async def leave_carrier(site: HTCondorSite, backend: HTCondorBackend, directory: Path) -> str:
    """Leave a carrier without pilots, as a submission does that is killed."""
    other = carriers(site)
    killed = killed_before("outcomes |= _materialize(", backend, directory)
    with pytest.raises(CEUnavailableError, match="no response from HTCondor's bindings"):
        await killed.submit([new_pilot("vo") for _ in range(6)])
    (carrier,) = carriers(site) - other
    return carrier


def killed_before(statement: str, backend: HTCondorBackend, directory: Path) -> HTCondorBackend:
    """A back end whose process is killed before this statement."""
    return changed(backend, directory, statement, f"os.kill(os.getpid(), 9); {statement}")


def new_pilot(vo: str) -> PilotAtCE:
    return PilotAtCE(uuid.uuid4().hex, vo)


async def submit(backend: HTCondorBackend, *vos: str) -> list[PilotAtCE]:
    return await submit_all(backend, [new_pilot(vo) for vo in vos])


async def submit_all(backend: HTCondorBackend, pilots: Sequence[PilotAtCE]) -> list[PilotAtCE]:
    outcomes = await backend.submit(pilots)
    assert all(outcome.reference for outcome in outcomes.values()), outcomes
    return [pilot._replace(reference=outcomes[pilot.stamp].reference) for pilot in pilots]


async def cleanup(backend: HTCondorBackend, ended: dict[PilotAtCE, MyPilotStatus]) -> None:
    await backend.cleanup([pilot._replace(status=status) for pilot, status in ended.items()])


def carriers(site: HTCondorSite) -> set[str]:
    """The clusters of the jobs that carry the files of pilots."""
    of_carriers = ("-constraint", "GubbinsCarrier =?= ClusterId")
    return set(site.run("condor_q", "-all", *of_carriers, "-af", "ClusterId").split())


def factories(site: HTCondorSite) -> set[str]:
    """The clusters whose jobs the schedd makes."""
    return set(re.findall(r"^ *(\d+)\. ", site.run("condor_q", "-all", "-factory"), re.MULTILINE))


def carrier_of(site: HTCondorSite, pilot: PilotAtCE) -> str:
    return site.run("condor_q", str(pilot.reference), "-af", "GubbinsCarrier").strip()


async def until_gone(backend: HTCondorBackend, site: HTCondorSite, carrier: str) -> None:
    """Polls until the carrier has left the queue."""

    async def gone() -> bool:
        if carrier not in carriers(site):
            return True
        await backend.poll([new_pilot("vo")])
        return False

    await until(gone, "the carrier has left the queue", pause=_PAUSE_SECONDS)


async def until_ended(backend: HTCondorBackend, pilots: Sequence[PilotAtCE]) -> list[Observation]:
    async def ended() -> list[Observation] | None:
        seen = await backend.poll(pilots)
        states = [seen[pilot.stamp] for pilot in pilots if pilot.stamp in seen]
        over = [each for each in states if each.state in (Observed.DONE, Observed.FAILED)]
        return over if len(over) == len(pilots) else None

    return list(await until(ended, "all pilots have ended", 120, _PAUSE_SECONDS))


async def until_seen(backend: HTCondorBackend, pilot: PilotAtCE, wanted: Observation) -> None:
    async def seen() -> bool:
        return (await backend.poll([pilot])).get(pilot.stamp) == wanted

    await until(seen, f"the pilot is {wanted}", 120, _PAUSE_SECONDS)
