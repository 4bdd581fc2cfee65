"""Pilots of a conformance test: what they do, and how they are submitted, polled and cancelled."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from gubbins.ces.protocol import CEBackend, Observation, Observed, PilotAtCE
from gubbins.domain.pilot_states import MyPilotStatus


class Scenario(StrEnum):
    """Behaviour of all pilots of a back end."""

    QUICK = "QUICK"  # succeeds soon
    FAILING = "FAILING"  # fails soon, with a reason
    LONG = "LONG"  # runs until it is cancelled, at least ten minutes


MakeBackend = Callable[[Scenario], CEBackend[Any]]
"""Creates a new instance for the same site at each call, as after a restart of the worker."""

_ENDS = (Observed.DONE, Observed.FAILED)


@dataclass
class PilotGroup:
    """Pilots of one test, polled as by checks, with a new back end for each call; cancelled at the end."""

    make: MakeBackend
    scenario: Scenario
    number: int
    deadline_seconds: float
    pause_seconds: float

    def __post_init__(self) -> None:
        self._used: list[CEBackend[Any]] = []
        self.pilots = [new_pilot() for _ in range(self.number)]
        self.seen: dict[str, Observation] = {}

    async def __aenter__(self) -> PilotGroup:
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.cancel()
        finally:
            for backend in self._used:
                await backend.close()

    def backend(self) -> CEBackend[Any]:
        """Create a back end, which is closed at the end of the test."""
        backend = self.make(self.scenario)
        self._used.append(backend)
        return backend

    async def submit(self) -> dict[str, str]:
        """Submit all pilots in one call; return the references by stamp."""
        outcomes = await self.backend().submit(self.pilots)
        assert set(outcomes) == {pilot.stamp for pilot in self.pilots}
        references = {}
        for stamp, outcome in outcomes.items():
            assert outcome.error is None, outcome.error
            assert outcome.reference
            references[stamp] = outcome.reference
        assert len(set(references.values())) == len(references)
        self.pilots = [pilot._replace(reference=references[pilot.stamp]) for pilot in self.pilots]
        return references

    def lose_references(self) -> None:
        """Drop the references, as after a crash before they are recorded."""
        self.pilots = [pilot._replace(reference=None) for pilot in self.pilots]

    async def poll(self) -> dict[str, Observation]:
        """Poll all pilots in one call, and update their states as a check: at most one step each."""
        self.seen = dict(await self.backend().poll(self.pilots))
        running = {stamp for stamp, seen in self.seen.items() if seen.state in (Observed.RUNNING, *_ENDS)}
        now = datetime.now(tz=UTC)
        self.pilots = [
            pilot._replace(status=MyPilotStatus.RUNNING, started_at=now)
            if pilot.stamp in running and pilot.status is MyPilotStatus.SUBMITTED
            else pilot
            for pilot in self.pilots
        ]
        return self.seen

    async def until(self, wanted: Observed, *, of: Sequence[PilotAtCE] = ()) -> dict[str, Observation]:
        """Poll until all pilots have the state; another final state fails the test.

        Requested cancellations are repeated before each poll.
        """
        stamps = {pilot.stamp for pilot in of or self.pilots}
        deadline = time.monotonic() + self.deadline_seconds
        while True:
            seen = {stamp: each for stamp, each in (await self.poll()).items() if stamp in stamps}
            if set(seen) == stamps and all(each.state is wanted for each in seen.values()):
                return seen
            wrong = [each for each in seen.values() if each.state in _ENDS and each.state is not wanted]
            assert not wrong, f"{wrong[0]} instead of {wanted}"
            assert time.monotonic() < deadline, f"still not {wanted}: {few(seen.values())}"
            await asyncio.sleep(self.pause_seconds)
            if any(pilot.cancel_requested for pilot in self.pilots):
                await self.cancel()

    async def cancel(self) -> None:
        """Cancel all pilots in one call."""
        self.pilots = [pilot._replace(cancel_requested=True) for pilot in self.pilots]
        await self.backend().cancel(self.pilots)

    def assert_reasons(self) -> None:
        """Check that each observation has a reason of one short line."""
        for seen in self.seen.values():
            assert seen.reason
            assert seen.reason.strip() == seen.reason
            assert "\n" not in seen.reason
            assert len(seen.reason) <= 500


@asynccontextmanager
async def closing(backend: CEBackend[Any]) -> AsyncIterator[CEBackend[Any]]:
    """Close a back end at the end."""
    try:
        yield backend
    finally:
        await backend.close()


def new_pilot() -> PilotAtCE:
    return PilotAtCE(stamp=uuid.uuid4().hex, vo="vo", submitted_at=datetime.now(tz=UTC))


def few(seen: Iterable[Observation]) -> str:
    return ", ".join(str(each) for each in list(seen)[:3]) or "unknown"
