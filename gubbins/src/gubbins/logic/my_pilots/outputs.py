"""Output of pilots: collected after their end, before the site removes it, and kept for a while."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import timedelta
from itertools import islice
from typing import Any

from gubbins.ces import CEBackend, PilotAtCE
from gubbins.ces.registry import load_backend
from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.outputs import Output
from gubbins.db.sql.schema import MAX_REASON_CHARS
from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall, CircuitState
from gubbins.domain.exceptions import CEUnavailableError, OutputUnavailableError
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.domain.rules import rules_of
from gubbins.domain.text import one_line

from .ce_calls import at_ce, backend_of, describe_failure
from .circuits import note_failure
from .response_validation import check_output

logger = logging.getLogger(__name__)

COLLECTED_PER_CE = 500
"""Most outputs that one round fetches from a compute element; the next one goes on."""

COLLECTING_SECONDS = 30
"""Longest time that one round fetches outputs from a compute element."""

_CHUNK = 50
_AT_A_TIME = 8


def ends_with_output(ce: Mapping[str, Any]) -> frozenset[MyPilotStatus]:
    """The ends at which the output of a pilot is to be fetched from this compute element."""
    keep = rules_of(ce).keep_output
    if keep == "none" or load_backend(ce["backend"]).output is CEBackend.output:
        return frozenset()
    return frozenset({MyPilotStatus.FAILED} if keep == "failed" else {MyPilotStatus.DONE, MyPilotStatus.FAILED})


async def collect_outputs(db: MyPilotDB, vo: str, *, per_ce: int = COLLECTED_PER_CE) -> int:
    """Collect the output of the VO's ended pilots; return the number of pilots.

    From all compute elements at the same time. A pilot is cleaned up once its output is stored, and not before:
    a crash on the way, or a site that is away for a while, costs no output. Output that cannot be fetched in
    `lost_seconds` is abandoned.
    """
    await db.prune_outputs()
    waiting = await db.ces_with_queued_outputs(vo=vo)
    if not waiting:
        return 0
    ces = [ce for ce in await db.get_ces() if ce["name"] in waiting and _may_be_asked(ce)]
    return sum(await asyncio.gather(*(_collect(db, vo, ce, per_ce) for ce in ces)))


def _may_be_asked(ce: Mapping[str, Any]) -> bool:
    # Outputs can wait: they are no probes of a half-open circuit.
    return ce["banned_at"] is None and ce["circuits"][CECall.STATUS]["state"] is CircuitState.CLOSED


async def _collect(db: MyPilotDB, vo: str, ce: Mapping[str, Any], per_ce: int) -> int:
    collected = 0
    turns = iter(await db.queued_outputs(vo=vo, ce_name=ce["name"], limit=per_ce))
    try:
        async with backend_of(ce, vo) as backend:
            collector = _OutputCollector(ce, vo, backend)
            while not collector.over and (chunk := list(islice(turns, _CHUNK))):
                fetched = await asyncio.gather(*(collector.fetch(pilot) for pilot in chunk))
                outputs = [output for output in fetched if output is not None]
                if not outputs:
                    break  # no response: the next round goes on
                await db.store_outputs(outputs)
                collected += len(outputs)
                stored = {output.pilot_id for output in outputs}
                await collector.cleanup([pilot for pilot in chunk if pilot.pilot_id in stored])
        if collector.timed_out is not None:
            await note_failure(db, ce, CECall.STATUS, collector.timed_out)
    except Exception as error:
        logger.warning("Cannot fetch the output of pilots at %s: %s", ce["name"], describe_failure(ce, error))
    return collected


class _OutputCollector:
    """Fetches outputs from one compute element for one round: no call is begun too late, or after a time-out."""

    def __init__(self, ce: Mapping[str, Any], vo: str, backend: CEBackend[Any]) -> None:
        self.timed_out: str | None = None
        self._ce, self._vo, self._backend = ce, vo, backend
        self._rules = rules_of(ce)
        self._slots = asyncio.Semaphore(_AT_A_TIME)
        self._until = time.monotonic() + COLLECTING_SECONDS

    @property
    def over(self) -> bool:
        return self.timed_out is not None or time.monotonic() >= self._until

    async def fetch(self, pilot: Any) -> Output | None:
        """Fetch the output of a pilot, or the reason why there is none; None: retry in a later round."""
        until = clock.now() + timedelta(seconds=self._rules.keep_output_seconds)
        asked = self._at_ce(pilot)
        async with self._slots:
            if self.over:
                return None
            try:
                async with self._answer():
                    answer = await self._backend.output(asked)
                output = check_output(self._ce, answer, asked.stamp)
            except OutputUnavailableError as error:
                return Output(pilot.pilot_id, until, error=one_line(error.reason, MAX_REASON_CHARS))
            except Exception as error:
                why = describe_failure(self._ce, error)
                logger.info("Cannot fetch the output of pilot %s at %s: %s", asked.stamp, self._ce["name"], why)
                if clock.now() - pilot.ended_at > timedelta(seconds=self._rules.lost_seconds):
                    return Output(pilot.pilot_id, until, error=why)
                return None
        owed = self._rules.registry_output
        return Output(pilot.pilot_id, until, output.stdout, output.stderr, owed=owed)

    async def cleanup(self, ended: Sequence[Any]) -> None:
        """Clean up after pilots whose output is stored; a failure is only logged."""
        try:
            async with self._answer():
                await self._backend.cleanup([self._at_ce(pilot) for pilot in ended])
        except Exception as error:
            why = describe_failure(self._ce, error)
            logger.warning("Cannot clean up after pilots at %s: %s", self._ce["name"], why)

    def _at_ce(self, pilot: Any) -> PilotAtCE:
        return PilotAtCE(
            pilot.stamp, self._vo, pilot.reference, pilot.status, pilot.submitted_at, pilot.started_at
        )

    @contextlib.asynccontextmanager
    async def _answer(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._rules.timeout_seconds):
                yield
        except TimeoutError as error:
            self.timed_out = describe_failure(self._ce, error)
            raise


async def get_pilot_output(db: MyPilotDB, pilot_id: int) -> dict[str, Any]:
    """Output of a pilot: `pilot_id`, `stdout`, `stderr`, and `fetched_at` and `expires_at` of stored output.

    For a pilot that still runs, or whose output was not fetched yet, it comes from the compute element, and
    `fetched_at` is None.

    Raises:
        PilotNotFoundError: there is no such pilot.
        OutputUnavailableError: there is none, or none any more.
        CEUnavailableError: the compute element does not respond.
    """
    pilot = await db.get_pilot(pilot_id)
    return await stored_output(db, pilot) or await ask_for_output(db, pilot)


async def stored_output(db: MyPilotDB, pilot: Mapping[str, Any]) -> dict[str, Any] | None:
    """Stored output of a pilot, as of `get_pilot_output`; None: nothing was fetched.

    Raises:
        OutputUnavailableError: there is none, or none any more.
    """
    stored = await db.get_output(pilot["pilot_id"])
    if stored is None:
        return None
    if (reason := stored.pop("error")) is not None:
        raise OutputUnavailableError(pilot["stamp"], reason)
    return {"pilot_id": pilot["pilot_id"], **stored}


async def ask_for_output(db: MyPilotDB, pilot: Mapping[str, Any]) -> dict[str, Any]:
    """Fetch the output of a pilot from its compute element, as of `get_pilot_output`.

    Raises:
        OutputUnavailableError: there is none, or none any more.
        CEUnavailableError: the compute element does not respond.
    """
    ce = await db.get_ce(pilot["ce_name"])
    if not _may_be_asked(ce):
        raise CEUnavailableError(
            f"compute element {ce['name']!r} is banned or paused: `gubbins ce show {ce['name']}`"
        )
    asked = at_ce(pilot)
    try:
        async with backend_of(ce, pilot["vo"]) as backend, asyncio.timeout(rules_of(ce).timeout_seconds):
            answer = await backend.output(asked)
        output = check_output(ce, answer, asked.stamp)
    except OutputUnavailableError:
        raise
    except Exception as error:
        raise CEUnavailableError(
            f"compute element {ce['name']!r} cannot be asked: {describe_failure(ce, error)}"
        ) from error
    return {
        "pilot_id": pilot["pilot_id"],
        "stdout": output.stdout,
        "stderr": output.stderr,
        "fetched_at": None,
        "expires_at": None,
    }
