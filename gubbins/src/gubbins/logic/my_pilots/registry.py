"""Synchronization with DiracX's pilot registry (`PilotAgentsDB`), and queries for jobs of pilots.

Our database records which changes are not written yet. None of our transactions is open during calls to the
registry, and each step can be repeated after a crash without registering a pilot twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from diracx.core.models.pilot import PilotStatus
from diracx.tasks.plumbing.sql.errors import ErrorKind, classify, describe
from diracx.tasks.plumbing.sql.types import sanitize

from gubbins.ces.registry import load_backend
from gubbins.db import registry as registry_db
from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.registrations import Registration
from gubbins.domain import clock
from gubbins.domain.exceptions import CESettingsError, RegistryUnavailableError
from gubbins.domain.rules import rules_of
from gubbins.domain.text import one_line

if TYPE_CHECKING:
    from diracx.db.sql import PilotAgentsDB

T = TypeVar("T")

logger = logging.getLogger(__name__)

UPDATE_SECONDS = 10
"""Time limit of the update in a check; the next one continues."""

PILOTS_PER_UPDATE = 5_000
"""Pilots that one check writes to the registry, at most."""

OUTPUT_BYTES = 65_535
"""Size of a column TEXT of MySQL: of a longer output the last part is written."""

MAX_LISTED = 1_000
"""Limit of listed differences, jobs of a pilot, and pilots of a job."""

_READ_SECONDS = 5
_BATCH = 500
_MAX_OUTPUTS = 500
_OUTPUT_BATCH = 20


async def update_registry(
    db: MyPilotDB, registry: PilotAgentsDB, vo: str, *, seconds: float = UPDATE_SECONDS
) -> int:
    """Write changed pilots of the VO to the registry; return the number of pilots written.

    Errors of the registry are logged; a later check writes the rest.
    """
    return await _log_failure(vo, seconds, lambda: _update(db, registry, vo))


async def _log_failure(vo: str, seconds: float, work: Callable[[], Awaitable[int]]) -> int:
    try:
        async with asyncio.timeout(seconds):
            return await work()
    except Exception as error:
        reason = f"no response for {seconds:g} s" if isinstance(error, TimeoutError) else describe_error(error)
        message = "The pilot registry was not updated with pilots of %s; the next check tries again: %s"
        logger.warning(message, vo, reason)
        return 0


def describe_error(error: Exception) -> str:
    """Describe an error of the registry in one line, for operators."""
    if (described := describe(registry_db.REGISTRY, error)) is None:
        return one_line(getattr(error, "orig", None) or error)
    described.__cause__ = described.__cause__ or error
    return one_line(described.detail, 500)


async def _update(db: MyPilotDB, registry: PilotAgentsDB, vo: str) -> int:
    while undone := await db.undone_registrations(_BATCH):
        aborted = {"Status": PilotStatus.ABORTED, "StatusReason": "its submission was undone"}
        ids, closed = [row[1] for row in undone], {row[2]: aborted for row in undone}
        await registry_db.update_entries(registry, ids, closed, LastUpdateTime=clock.now())
        await db.delete_undone_registrations([row[0] for row in undone])
    written = 0
    if pilots := await db.unwritten_registrations(vo=vo, limit=PILOTS_PER_UPDATE):
        writer = _Writer(db, registry, {ce["name"]: ce for ce in await db.list_ces()})
        for first in range(0, len(pilots), _BATCH):
            written += await writer.write(pilots[first : first + _BATCH])
    return written


@dataclass(frozen=True)
class _Writer:
    """Writes pilots to the registry."""

    db: MyPilotDB
    registry: PilotAgentsDB
    ces: Mapping[str, Mapping[str, Any]]

    async def write(self, pilots: Sequence[Registration]) -> int:
        """Register or update pilots, and return their number; a refused one is skipped, found by bisection."""
        try:
            await self._write(pilots)
            return len(pilots)
        except Exception as error:
            if classify(error) is not ErrorKind.REFUSED:
                raise
            if len(pilots) == 1:
                logger.warning("The pilot registry refuses pilot %s: %s", pilots[0].stamp, describe_error(error))
                return 0
        half = len(pilots) // 2
        return await self.write(pilots[:half]) + await self.write(pilots[half:])

    async def _write(self, pilots: Sequence[Registration]) -> None:
        entries = await _entries_of(self.registry, pilots)
        if new := [pilot for pilot in pilots if pilot.stamp not in entries]:
            await registry_db.insert_entries(self.registry, [self._new_entry(pilot) for pilot in new])
            entries |= await _entries_of(self.registry, new)
        # A concurrent check may have registered the same pilots: both keep the first entry.
        if duplicates := [entry.registry_id for found in entries.values() for entry in found[1:]]:
            await registry_db.delete_entries(self.registry, duplicates)
        ids = {stamp: found[0].registry_id for stamp, found in entries.items()}
        await self.db.set_registry_ids(
            {pilot.stamp: ids[pilot.stamp] for pilot in pilots if pilot.registry_id != ids[pilot.stamp]},
            ce_names={pilot.ce_name for pilot in pilots},
            submitted={pilot.stamp for pilot in pilots if pilot.status is PilotStatus.SUBMITTED},
        )
        values = {pilot.stamp: _values(pilot) for pilot in pilots}
        await registry_db.update_entries(self.registry, ids.values(), values, LastUpdateTime=clock.now())
        await self.db.mark_registered(pilots)

    def _new_entry(self, pilot: Registration) -> dict[str, Any]:
        ce = self.ces.get(pilot.ce_name, {"backend": "", "settings": {}, "rules": None})
        rules = rules_of(ce)
        try:
            backend = load_backend(ce["backend"])
            grid_type = backend.grid_type_of(ce["settings"]) or ce["backend"]
            queue = ce["settings"].get(backend.queue_setting)
        except CESettingsError:  # not installed here
            grid_type, queue = ce["backend"], None
        return {
            "PilotStamp": pilot.stamp,
            "PilotJobReference": pilot.stamp,  # to find the entry: stamps have no index
            "VO": _to_ascii(pilot.vo, 128),
            "GridType": _to_ascii(grid_type, 32),
            "GridSite": _to_ascii(rules.site or "Unknown", 128),
            "DestinationSite": _destination(ce, pilot.ce_name),
            "Queue": _to_ascii(str(rules.queue or queue or "Unknown"), 128),
            "SubmissionTime": pilot.submitted_at,
            "LastUpdateTime": clock.now(),
            "Status": PilotStatus.SUBMITTED,
            "StatusReason": "",
        }


def _destination(ce: Mapping[str, Any], name: str) -> str:
    return _to_ascii(rules_of(ce).grid_ce or name, 128)


def _reference(pilot: Registration) -> str:
    return _to_ascii(pilot.reference or pilot.stamp, 255)


def _values(pilot: Registration) -> dict[str, Any]:
    reason = _to_ascii(pilot.waiting_reason or pilot.last_error or "", 255)
    return {"Status": pilot.status, "StatusReason": reason, "PilotJobReference": _reference(pilot)}


async def _entries_of(
    registry: PilotAgentsDB, pilots: Sequence[Registration]
) -> dict[str, list[registry_db.Entry]]:
    stamps = {pilot.stamp for pilot in pilots}
    ids = [pilot.registry_id for pilot in pilots if pilot.registry_id is not None]
    return await registry_db.find_entries(registry, ids, stamps | {_reference(pilot) for pilot in pilots}, stamps)


async def write_registry_outputs(db: MyPilotDB, registry: PilotAgentsDB, vo: str, *, seconds: float = 30) -> int:
    """Write outputs of the VO's pilots to the registry, of long ones the last part; else as `update_registry`."""

    async def write() -> int:
        written = 0
        while written < _MAX_OUTPUTS and (rows := await db.unwritten_outputs(vo=vo, limit=_OUTPUT_BATCH)):
            outputs = [
                (id, _to_ascii(out)[-OUTPUT_BYTES:], _to_ascii(err)[-OUTPUT_BYTES:]) for _, id, out, err in rows
            ]
            await registry_db.write_outputs(registry, outputs)
            await db.mark_outputs_written([row[0] for row in rows])
            written += len(rows)
        return written

    return await _log_failure(vo, seconds, write)


def _to_ascii(text: str, max_chars: int | None = None) -> str:
    """Escape to ASCII, which columns of any character set can store."""
    return sanitize(text.encode("ascii", "backslashreplace").decode())[:max_chars]


@dataclass(frozen=True)
class Difference:
    """Difference of a pilot between the two databases; fields are None where it is missing."""

    stamp: str
    vo: str
    ce_name: str
    pilot_id: int | None
    status: str | None
    """Status that the registry should have."""
    registry_id: int | None
    registry_status: str | None


@dataclass
class Reconciliation:
    """Result of the comparison with the registry: numbers of pilots, and differences."""

    compared: int = 0
    missing: int = 0
    """Not in the registry."""
    different: int = 0
    """With another status in the registry."""
    unknown: int = 0
    """Only in the registry, active, at one of our compute elements; never changed."""
    mended: int = 0
    differences: list[Difference] = field(default_factory=list)
    """The first `MAX_LISTED`."""

    @property
    def remaining(self) -> int:
        """Number of differences that are left."""
        return self.missing + self.different + self.unknown - self.mended

    def add(self, difference: Difference) -> None:
        if len(self.differences) < MAX_LISTED:
            self.differences.append(difference)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "remaining": self.remaining}


async def reconcile_registry(
    db: MyPilotDB,
    registry: PilotAgentsDB,
    vo: str | None = None,
    *,
    apply: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Reconciliation:
    """Compare all pilots with the registry.

    Args:
        vo: only pilots of this VO.
        apply: True: correct the registry.
        progress: called with the number of pilots compared so far.

    Raises:
        Exception: of either database; corrections made so far stay.
    """
    result, after = Reconciliation(), 0
    ces = {ce["name"]: ce for ce in await db.list_ces()}
    writer = _Writer(db, registry, ces)
    while pilots := await db.registrations(vo=vo, after=after, limit=_BATCH):
        after = pilots[-1].pilot_id
        entries = await _entries_of(registry, pilots)
        wrong = []
        for pilot in pilots:
            entry = next(iter(entries.get(pilot.stamp, ())), None)
            if entry is not None and entry.status == pilot.status:
                continue
            wrong.append(pilot)
            result.missing += entry is None
            result.different += entry is not None
            found = (None, None) if entry is None else (entry.registry_id, entry.status)
            result.add(Difference(pilot.stamp, pilot.vo, pilot.ce_name, pilot.pilot_id, pilot.status, *found))
        if apply and wrong:
            result.mended += await writer.write(wrong)
        result.compared += len(pilots)
        progress(result.compared)
    after, destinations = 0, {_destination(ce, name) for name, ce in ces.items()}
    of_vo = None if vo is None else _to_ascii(vo, 128)
    while active := await registry_db.list_open(registry, destinations, of_vo, after=after, limit=_BATCH):
        after = active[-1].registry_id
        known = await db.known_stamps({entry.stamp for entry in active})
        for entry in active:
            if entry.stamp not in known:
                result.unknown += 1
                ids = (None, None, entry.registry_id, entry.status)
                result.add(Difference(entry.stamp, entry.vo, entry.ce_name, *ids))
    return result


async def jobs_of_pilot(registry: PilotAgentsDB | None, pilot: Mapping[str, Any]) -> list[int] | None:
    """Read the ids of the jobs that ran on a pilot, newest first; None: no registry, or it does not respond."""
    if registry is None:
        return None
    if (registry_id := pilot["registry_id"]) is None:
        return []
    try:
        return await _read(registry_db.jobs_of(registry, registry_id, pilot["stamp"], limit=MAX_LISTED))
    except RegistryUnavailableError as error:
        logger.warning("Cannot read the jobs of pilot %d: %s", pilot["pilot_id"], error)
        return None


async def stamps_of_job(registry: PilotAgentsDB | None, job_id: int) -> list[str]:
    """Read the stamps of the pilots, of any VO, on which a job ran.

    Raises:
        RegistryUnavailableError: no registry is configured, or it does not respond.
    """
    if registry is None:
        raise RegistryUnavailableError(
            f"no pilot registry is configured: set {registry_db.REGISTRY_VARIABLE} to find pilots of jobs"
        )
    return await _read(registry_db.stamps_of(registry, job_id, limit=MAX_LISTED))


async def _read(response: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(_READ_SECONDS):
            return await response
    except TimeoutError as error:
        raise RegistryUnavailableError(f"the pilot registry has not responded within {_READ_SECONDS} s") from error
    except Exception as error:
        described = describe(registry_db.REGISTRY, error)
        public = "the pilot registry does not respond" if described is None else str(described)
        raise RegistryUnavailableError(describe_error(error), public) from error
