"""Back end `simulated`: pilots whose states depend only on the clock and a hash of their stamps.

It stores nothing: all workers compute the same states.
"""

from __future__ import annotations

__all__ = ["SimulatedBackend", "SimulatedSettings"]

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from pydantic import Field

from gubbins.domain import clock
from gubbins.domain.pilot_states import MyPilotStatus

from .protocol import CEBackend, CESettings, Observation, Observed, PilotAtCE, SubmitOutcome

_WAITING = Observation(Observed.WAITING)
_RUNNING = Observation(Observed.RUNNING)
_DONE = Observation(Observed.DONE)
_FAILED = Observation(Observed.FAILED, "simulated failure")
_CANCELLED = Observation(Observed.FAILED, "cancelled")


class SimulatedSettings(CESettings):
    """Settings of a simulated compute element."""

    seed: int = Field(default=0, description="Seed of the pseudo-random results.")
    queue_seconds: float = Field(
        default=0, ge=0, allow_inf_nan=False, description="Time for which a pilot waits before it runs."
    )
    run_seconds: float = Field(default=0, ge=0, allow_inf_nan=False, description="Time for which a pilot runs.")


class SimulatedBackend(CEBackend[SimulatedSettings]):
    """Simulated compute element with the given `success_rate` and durations."""

    Settings = SimulatedSettings

    async def submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        return {pilot.stamp: SubmitOutcome(reference=self._reference(pilot)) for pilot in pilots}

    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        now = clock.now()
        started_by = now - timedelta(seconds=self.settings.queue_seconds)
        ended_by = now - timedelta(seconds=self.settings.run_seconds)
        seen = {pilot.stamp: self._observe(pilot, started_by, ended_by) for pilot in pilots}
        for pilot in pilots:
            if pilot.reference is None:
                seen[pilot.stamp] = seen[pilot.stamp]._replace(reference=self._reference(pilot))
        return seen

    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        pass  # `poll` uses the request of the database

    def _reference(self, pilot: PilotAtCE) -> str:
        return f"sim://{self.ce.name}/{pilot.stamp}"

    def _observe(self, pilot: PilotAtCE, started_by: datetime, ended_by: datetime) -> Observation:
        if pilot.cancel_requested:
            return _CANCELLED
        if pilot.status is MyPilotStatus.SUBMITTED:
            waits = pilot.submitted_at is not None and pilot.submitted_at > started_by
            return _WAITING if waits else _RUNNING
        if pilot.started_at is not None and pilot.started_at > ended_by:
            return _RUNNING
        return _DONE if self.will_succeed(pilot.stamp) else _FAILED

    def will_succeed(self, stamp: str) -> bool:
        """True if the pilot ends as DONE: for a fraction `success_rate` of all stamps."""
        digest = hashlib.blake2b(f"{self.settings.seed}:{stamp}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64 < self.ce.success_rate
