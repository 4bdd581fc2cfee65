"""Output of pilots: fetched after their end, before the site removes it, and stored for a limited time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import timedelta
from itertools import islice
from shlex import quote
from typing import Any

from gubbins.ces import CEBackend
from gubbins.ces.registry import load_backend
from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.outputs import Output
from gubbins.db.sql.schema import MAX_REASON_CHARS
from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.exceptions import CEUnavailableError, OutputUnavailableError
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.domain.rules import rules_of
from gubbins.domain.text import one_line

from .ce_calls import at_ce, backend_of, describe_failure
from .circuits import is_reachable, record_call_failure
from .response_validation import check_output

logger = logging.getLogger(__name__)

COLLECTED_PER_CE = 500
"""Outputs fetched from a compute element in one round, at most."""

COLLECTING_SECONDS = 30
"""Time for one compute element in one round, at most."""

_CHUNK = 50
_MAX_CONCURRENT = 8


def statuses_with_output(ce: Mapping[str, Any]) -> frozenset[MyPilotStatus]:
    """Final states for which output is fetched from this compute element."""
    keep = rules_of(ce).keep_output
    if keep == "none" or load_backend(ce["backend"]).output is CEBackend.output:
        return frozenset()
    return frozenset({MyPilotStatus.FAILED} if keep == "failed" else {MyPilotStatus.DONE, MyPilotStatus.FAILED})


async def collect_outputs(db: MyPilotDB, vo: str, *, per_ce: int = COLLECTED_PER_CE) -> int:
    """Collect the output of the VO's ended pilots, from all compute elements concurrently; return their number.

    A pilot is cleaned up only after its output is stored, so that neither a crash nor an outage of the site loses
    output. Output that cannot be fetched within `lost_seconds` is abandoned.
    """
    await db.prune_outputs()
    waiting = await db.ces_with_queued_outputs(vo=vo)
    if not waiting:
        return 0
    ces = await db.list_ces(vo=vo, serving=False)
    ces = [ce for ce in ces if ce["name"] in waiting and is_reachable(ce)]
    return sum(await asyncio.gather(*(_collect(db, vo, ce, per_ce) for ce in ces)))


async def _collect(db: MyPilotDB, vo: str, ce: Mapping[str, Any], per_ce: int) -> int:
    collected = 0
    queued = iter(await db.queued_outputs(vo=vo, ce_name=ce["name"], limit=per_ce))
    try:
        async with backend_of(ce, vo) as backend:
            collector = _OutputCollector(ce, backend)
            while not collector.stopped and (chunk := list(islice(queued, _CHUNK))):
                fetched = await asyncio.gather(*(collector.fetch(pilot) for pilot in chunk))
                outputs = [output for output in fetched if output is not None]
                if not outputs:
                    break
                await db.store_outputs(outputs)
                collected += len(outputs)
                stored = {output.pilot_id for output in outputs}
                await collector.cleanup([pilot for pilot in chunk if pilot.pilot_id in stored])
        if collector.timed_out is not None:
            await record_call_failure(db, ce, CECall.STATUS, collector.timed_out)
    except Exception as error:
        logger.warning("Cannot fetch the output of pilots at %s: %s", ce["name"], describe_failure(ce, error))
    return collected


class _OutputCollector:
    """Fetches outputs from one compute element in one round; stops at the deadline and after a time-out."""

    def __init__(self, ce: Mapping[str, Any], backend: CEBackend[Any]) -> None:
        self.timed_out: str | None = None
        self._ce, self._backend = ce, backend
        self._rules = rules_of(ce)
        self._slots = asyncio.Semaphore(_MAX_CONCURRENT)
        self._until = time.monotonic() + COLLECTING_SECONDS

    @property
    def stopped(self) -> bool:
        return self.timed_out is not None or time.monotonic() >= self._until

    async def fetch(self, pilot: Any) -> Output | None:
        """Fetch the output of a pilot, or the reason why there is none; None: retry in a later round."""
        until = clock.now() + timedelta(seconds=self._rules.keep_output_seconds)
        async with self._slots:
            if self.stopped:
                return None
            try:
                async with self._time_limit():
                    response = await self._backend.output(at_ce(pilot._mapping))
                output = check_output(self._ce, response, pilot.stamp)
            except OutputUnavailableError as error:
                return Output(pilot.pilot_id, until, error=one_line(error.reason, MAX_REASON_CHARS))
            except Exception as error:
                reason = describe_failure(self._ce, error)
                logger.info("Cannot fetch the output of pilot %s at %s: %s", pilot.stamp, self._ce["name"], reason)
                if clock.now() - pilot.ended_at > timedelta(seconds=self._rules.lost_seconds):
                    return Output(pilot.pilot_id, until, error=reason)
                return None
        owed = self._rules.registry_output
        return Output(pilot.pilot_id, until, output.stdout, output.stderr, owed=owed)

    async def cleanup(self, ended: Sequence[Any]) -> None:
        """Clean up after pilots whose output is stored; errors are only logged."""
        try:
            async with self._time_limit():
                await self._backend.cleanup([at_ce(pilot._mapping) for pilot in ended])
        except Exception as error:
            reason = describe_failure(self._ce, error)
            logger.warning("Cannot clean up after pilots at %s: %s", self._ce["name"], reason)

    @contextlib.asynccontextmanager
    async def _time_limit(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._rules.timeout_seconds):
                yield
        except TimeoutError as error:
            self.timed_out = describe_failure(self._ce, error)
            raise


async def get_pilot_output(db: MyPilotDB, pilot_id: int) -> dict[str, Any]:
    """Get the stored output of a pilot, or else fetch it from the compute element.

    Returns:
        `pilot_id`, `stdout`, `stderr`, `fetched_at` and `expires_at`; the last two are None if it is not stored.

    Raises:
        PilotNotFoundError: there is no such pilot.
        OutputUnavailableError: there is no output, or it was removed.
        CEUnavailableError: the compute element does not respond.
    """
    pilot = await db.get_pilot(pilot_id)
    return await stored_output(db, pilot) or await fetch_output(db, pilot)


async def stored_output(db: MyPilotDB, pilot: Mapping[str, Any]) -> dict[str, Any] | None:
    """Get the stored output of a pilot as `get_pilot_output`; None: it was not fetched yet.

    Raises:
        OutputUnavailableError: there is no output, or it was removed.
    """
    stored = await db.get_output(pilot["pilot_id"])
    if stored is None:
        return None
    if (reason := stored.pop("error")) is not None:
        raise OutputUnavailableError(pilot["stamp"], reason)
    return {"pilot_id": pilot["pilot_id"], **stored}


async def fetch_output(db: MyPilotDB, pilot: Mapping[str, Any]) -> dict[str, Any]:
    """Fetch the output of a pilot from its compute element, as `get_pilot_output`.

    Raises:
        OutputUnavailableError: there is no output, or it was removed.
        CEUnavailableError: the compute element does not respond.
    """
    ce = await db.get_ce(pilot["ce_name"], pilot["vo"])
    if not is_reachable(ce):
        raise CEUnavailableError(
            f"compute element {ce['name']!r} is banned or paused: `gubbins ce show {quote(ce['name'])}`"
        )
    try:
        async with backend_of(ce, pilot["vo"]) as backend, asyncio.timeout(rules_of(ce).timeout_seconds):
            response = await backend.output(at_ce(pilot))
        output = check_output(ce, response, pilot["stamp"])
    except OutputUnavailableError:
        raise
    except Exception as error:
        raise CEUnavailableError(
            f"cannot fetch the output from compute element {ce['name']!r}: {describe_failure(ce, error)}"
        ) from error
    return {"pilot_id": pilot["pilot_id"], **output._asdict(), "fetched_at": None, "expires_at": None}
