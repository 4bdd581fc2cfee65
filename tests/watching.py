"""Waits of tests of back ends for pilots, processes and files. Each succeeds in time, or fails."""

from __future__ import annotations

__all__ = ["ENDED", "alive", "ended", "observe", "until", "written"]

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gubbins.ces import CEBackend, Observation, Observed, PilotAtCE
from gubbins.domain.pilot_states import MyPilotStatus

ENDED = (Observed.DONE, Observed.FAILED)
_SECONDS = 100
_PAUSE_SECONDS = 0.05


async def until(condition: Callable[[], object]) -> None:
    """Return when the condition holds."""
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it has not come to that"
        await asyncio.sleep(_PAUSE_SECONDS)


async def observe(backend: CEBackend[Any], pilot: PilotAtCE, *wanted: Observed) -> Observation:
    """Wait until the back end reports one of these states of the pilot."""
    deadline = time.monotonic() + _SECONDS
    while True:
        seen = (await backend.poll([pilot])).get(pilot.stamp)
        if seen is not None and seen.state in wanted:
            return seen
        assert time.monotonic() < deadline, f"still {seen}"
        await asyncio.sleep(_PAUSE_SECONDS)


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
