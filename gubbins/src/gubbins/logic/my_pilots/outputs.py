"""What pilots have written: fetched once they have ended, before their site forgets it, and kept for a while."""

from __future__ import annotations

__all__ = ["collect_outputs", "get_pilot_output", "wants_output"]

import asyncio
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import islice
from typing import Any

from gubbins import clock
from gubbins.ces import CEBackend, PilotAtCE
from gubbins.ces.registry import load_backend
from gubbins.circuits import CECall, CircuitState
from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.outputs import Output
from gubbins.exceptions import CEUnavailableError, OutputUnavailableError
from gubbins.pilot_states import MyPilotStatus

from .backends import backend_of, describe_failure
from .rules import rules_of

logger = logging.getLogger(__name__)

COLLECTED_AT_ONCE = 500
"""A check fetches no more outputs than that; the next one goes on."""

_CHUNK = 50
_AT_A_TIME = 8


def wants_output(ce: Mapping[str, Any], status: MyPilotStatus) -> bool:
    """Whether the output of a pilot that ended so is to be fetched from this compute element."""
    keep = rules_of(ce).keep_output
    wanted = keep == "all" or (keep == "failed" and status is MyPilotStatus.FAILED)
    return wanted and load_backend(ce["backend"]).output is not CEBackend.output


async def collect_outputs(db: MyPilotDB, vo: str) -> int:
    """Fetch what the VO's ended pilots have written, and return of how many.

    The compute element may forget a pilot once that is stored, and not before: a crash on the way, or a site
    that is away for a while, costs no output. One that cannot be had in `lost_seconds` is given up.
    """
    await db.prune_outputs()
    queued = await db.queued_outputs(vo=vo, limit=COLLECTED_AT_ONCE)
    if not queued:
        return 0
    by_ce: dict[str, list[Any]] = defaultdict(list)
    for pilot in queued:
        by_ce[pilot.ce_name].append(pilot)
    ces = [ce for ce in await db.get_ces() if ce["name"] in by_ce and _may_be_asked(ce)]
    done = await asyncio.gather(*(_collect(db, vo, ce, by_ce[ce["name"]]) for ce in ces))
    return sum(done)


def _may_be_asked(ce: Mapping[str, Any]) -> bool:
    # Outputs can wait: they are no probes of a compute element that is being tried again.
    return ce["banned_at"] is None and ce["circuits"][CECall.STATUS]["state"] is CircuitState.CLOSED


async def _collect(db: MyPilotDB, vo: str, ce: Mapping[str, Any], pilots: Sequence[Any]) -> int:
    collected = 0
    turns = iter(pilots)
    try:
        async with backend_of(ce) as backend:
            while chunk := list(islice(turns, _CHUNK)):
                slots = asyncio.Semaphore(_AT_A_TIME)
                fetched = await asyncio.gather(*(_fetch(ce, vo, backend, pilot, slots) for pilot in chunk))
                outputs = [output for output in fetched if output is not None]
                await db.store_outputs(outputs)
                stored = {output.pilot_id for output in outputs}
                ended = {pilot.stamp: pilot.status for pilot in chunk if pilot.pilot_id in stored}
                async with asyncio.timeout(rules_of(ce).timeout_seconds):
                    await backend.forget(ended)
                collected += len(outputs)
                if len(outputs) < len(chunk):
                    break  # it does not answer: the next check goes on
    except Exception as error:
        logger.warning("Cannot fetch the output of pilots at %s: %s", ce["name"], describe_failure(ce, error))
    return collected


async def _fetch(
    ce: Mapping[str, Any], vo: str, backend: CEBackend[Any], pilot: Any, slots: asyncio.Semaphore
) -> Output | None:
    rules = rules_of(ce)
    until = clock.now() + timedelta(seconds=rules.keep_output_seconds)
    asked = PilotAtCE(pilot.stamp, vo, pilot.reference, pilot.status, pilot.submitted_at, pilot.started_at)
    try:
        async with slots, asyncio.timeout(rules.timeout_seconds):
            output = await backend.output(asked)
    except OutputUnavailableError as error:
        return Output(pilot.pilot_id, until, error=error.reason)
    except Exception as error:
        if clock.now() - pilot.ended_at > timedelta(seconds=rules.lost_seconds):
            return Output(pilot.pilot_id, until, error=describe_failure(ce, error))
        return None
    return Output(pilot.pilot_id, until, output.stdout, output.stderr)


async def get_pilot_output(db: MyPilotDB, pilot_id: int) -> dict[str, Any]:
    """What a pilot has written: `pilot_id`, `stdout`, `stderr`, and `fetched_at` and `expires_at` of what is kept.

    Of a pilot that still runs, and of one whose output was not fetched yet, the compute element is asked;
    `fetched_at` is None then.

    Raises:
        PilotNotFoundError: there is no such pilot.
        OutputUnavailableError: there is none, or none any more.
        CEUnavailableError: the compute element has it, and cannot be asked now.
    """
    pilot = await db.get_pilot(pilot_id)
    stored = await db.get_output(pilot_id)
    if stored is not None:
        if (reason := stored.pop("error")) is not None:
            raise OutputUnavailableError(pilot["stamp"], reason)
        return {"pilot_id": pilot_id, **stored}
    ce = await db.get_ce(pilot["ce_name"])
    if not _may_be_asked(ce):
        raise CEUnavailableError(
            f"compute element {ce['name']!r} is banned or paused: `gubbins ce show {ce['name']}`"
        )
    asked = PilotAtCE(
        pilot["stamp"],
        pilot["vo"],
        pilot["reference"],
        pilot["status"],
        pilot["submitted_at"],
        pilot["started_at"],
    )
    try:
        async with asyncio.timeout(rules_of(ce).timeout_seconds), backend_of(ce) as backend:
            output = await backend.output(asked)
    except OutputUnavailableError:
        raise
    except Exception as error:
        raise CEUnavailableError(
            f"compute element {ce['name']!r} cannot be asked: {describe_failure(ce, error)}"
        ) from error
    return {
        "pilot_id": pilot_id,
        "stdout": output.stdout,
        "stderr": output.stderr,
        "fetched_at": None,
        "expires_at": None,
    }
