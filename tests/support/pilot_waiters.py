"""Waiters for pilots, processes and files in tests of back ends."""

from __future__ import annotations

__all__ = ["ENDED", "alive", "ended", "observe", "written"]

from pathlib import Path
from typing import Any

from gubbins.ces import CEBackend, Observation, Observed, PilotAtCE
from gubbins.domain.pilot_states import MyPilotStatus
from support.waiting import until

ENDED = (Observed.DONE, Observed.FAILED)
_PAUSE_SECONDS = 0.05


async def observe(backend: CEBackend[Any], pilot: PilotAtCE, *wanted: Observed) -> Observation:
    """Wait until the back end reports one of these states of the pilot."""
    last: list[Observation | None] = [None]

    async def observed() -> Observation | None:
        last[0] = (await backend.poll([pilot])).get(pilot.stamp)
        return last[0] if last[0] is not None and last[0].state in wanted else None

    try:
        found: Observation = await until(observed, pause=_PAUSE_SECONDS)
    except AssertionError:
        raise AssertionError(f"still {last[0]}") from None
    return found


def ended(**ends: MyPilotStatus) -> list[PilotAtCE]:
    """Pilots of these stamps that are recorded as ended so."""
    return [PilotAtCE(stamp, "vo", status=status) for stamp, status in ends.items()]


def written(path: Path) -> str:
    """Return the text of a file, stripped; empty: there is no file (yet)."""
    return path.read_text().strip() if path.exists() else ""


def alive(pid: int) -> bool:
    """True if there is such a process, and it is not one that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
