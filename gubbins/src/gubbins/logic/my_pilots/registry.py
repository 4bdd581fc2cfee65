"""DiracX's pilot registry (`PilotAgentsDB`): written behind the checks, compared and mended, and read for jobs.

What is owed to it is kept in our database, and no transaction of ours is open while the registry is talked to.
Each step may be repeated: nothing is registered twice when a worker dies between two of them.
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
from gubbins.db import registry as there
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
"""Longest time for which a check waits for the registry; what is left stays owed."""

PILOTS_PER_UPDATE = 5_000
"""Most pilots that one check writes to the registry; the next one goes on."""

OUTPUT_BYTES = 65_535
"""Size of a column TEXT of MySQL: the registry gets the last part of a longer output."""

LISTED = 1_000
"""Most differences, jobs or pilots of a job that are listed."""

_READ_SECONDS = 5
_BATCH = 500
_OUTPUTS = 500
_OUTPUT_BATCH = 20


async def update_registry(
    db: MyPilotDB, registry: PilotAgentsDB, vo: str, *, seconds: float = UPDATE_SECONDS
) -> int:
    """Write what is owed of the VO's pilots to the registry; return the number of pilots written.

    A registry that is away, slow or refuses is one warning; what is owed is written by a later check.
    """
    return await _tried(vo, seconds, lambda: _update(db, registry, vo))


async def _tried(vo: str, seconds: float, work: Callable[[], Awaitable[int]]) -> int:
    try:
        async with asyncio.timeout(seconds):
            return await work()
    except Exception as error:
        why = f"no answer for {seconds:g} s" if isinstance(error, TimeoutError) else explain(error)
        logger.warning("The pilot registry lacks news of pilots of %s, which stay owed: %s", vo, why)
        return 0


def explain(error: Exception) -> str:
    """The error of the registry, in one line for operators."""
    if (described := describe(there.REGISTRY, error)) is None:
        return one_line(getattr(error, "orig", None) or error)
    described.__cause__ = described.__cause__ or error
    return one_line(described.detail, 500)


async def _update(db: MyPilotDB, registry: PilotAgentsDB, vo: str) -> int:
    while undone := await db.undone_registrations(_BATCH):
        end = {"Status": PilotStatus.ABORTED, "StatusReason": "its submission was undone"}
        ids, closed = [row[1] for row in undone], {row[2]: end for row in undone}
        await there.update_entries(registry, ids, closed, LastUpdateTime=clock.now())
        await db.forget_undone_registrations([row[0] for row in undone])
    written = 0
    if owed := await db.owed_registrations(vo=vo, limit=PILOTS_PER_UPDATE):
        writer = _Writer(db, registry, {ce["name"]: ce for ce in await db.get_ces()})
        for first in range(0, len(owed), _BATCH):
            written += await writer.write(owed[first : first + _BATCH])
    return written


@dataclass(frozen=True)
class _Writer:
    """Writes pilots to the registry."""

    db: MyPilotDB
    registry: PilotAgentsDB
    ces: Mapping[str, Mapping[str, Any]]

    async def write(self, pilots: Sequence[Registration]) -> int:
        """Register or update these pilots, and return their number. One that is refused does not stop the rest."""
        try:
            await self._write(pilots)
            return len(pilots)
        except Exception as error:
            if classify(error) is not ErrorKind.REFUSED:
                raise
            if len(pilots) == 1:
                logger.warning("The pilot registry refuses pilot %s: %s", pilots[0].stamp, explain(error))
                return 0
        half = len(pilots) // 2
        return await self.write(pilots[:half]) + await self.write(pilots[half:])

    async def _write(self, pilots: Sequence[Registration]) -> None:
        entries = await _entries_of(self.registry, pilots)
        if new := [pilot for pilot in pilots if pilot.stamp not in entries]:
            await there.insert_entries(self.registry, [self._new_entry(pilot) for pilot in new])
            entries |= await _entries_of(self.registry, new)
        # Another check may have registered them at the same time: both keep the first.
        if twice := [entry.registry_id for found in entries.values() for entry in found[1:]]:
            await there.delete_entries(self.registry, twice)
        ids = {stamp: found[0].registry_id for stamp, found in entries.items()}
        await self.db.note_registry_ids(
            {pilot.stamp: ids[pilot.stamp] for pilot in pilots if pilot.registry_id != ids[pilot.stamp]},
            ce_names={pilot.ce_name for pilot in pilots},
            submitted={pilot.stamp for pilot in pilots if pilot.status is PilotStatus.SUBMITTED},
        )
        values = {pilot.stamp: _values(pilot) for pilot in pilots}
        await there.update_entries(self.registry, ids.values(), values, LastUpdateTime=clock.now())
        await self.db.note_registered(pilots)

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
            "PilotJobReference": pilot.stamp,  # by which it is found: stamps have no index there
            "VO": _plain(pilot.vo, 128),
            "GridType": _plain(grid_type, 32),
            "GridSite": _plain(rules.site or "Unknown", 128),
            "DestinationSite": _destination(ce, pilot.ce_name),
            "Queue": _plain(str(rules.queue or queue or "Unknown"), 128),
            "SubmissionTime": pilot.submitted_at,
            "LastUpdateTime": clock.now(),
            "Status": PilotStatus.SUBMITTED,
            "StatusReason": "",
        }


def _destination(ce: Mapping[str, Any], name: str) -> str:
    return _plain(rules_of(ce).grid_ce or name, 128)


def _reference(pilot: Registration) -> str:
    return _plain(pilot.reference or pilot.stamp, 255)


def _values(pilot: Registration) -> dict[str, Any]:
    reason = _plain(pilot.waiting_reason or pilot.last_error or "", 255)
    return {"Status": pilot.status, "StatusReason": reason, "PilotJobReference": _reference(pilot)}


async def _entries_of(registry: PilotAgentsDB, pilots: Sequence[Registration]) -> dict[str, list[there.Entry]]:
    stamps = {pilot.stamp for pilot in pilots}
    ids = [pilot.registry_id for pilot in pilots if pilot.registry_id is not None]
    return await there.find_entries(registry, ids, stamps | {_reference(pilot) for pilot in pilots}, stamps)


async def write_registry_outputs(db: MyPilotDB, registry: PilotAgentsDB, vo: str, *, seconds: float = 30) -> int:
    """Write outputs of the VO's pilots that are owed to the registry, the last part of long ones.

    As `update_registry`.
    """

    async def write() -> int:
        written = 0
        while written < _OUTPUTS and (owed := await db.owed_outputs(vo=vo, limit=_OUTPUT_BATCH)):
            outputs = [(id, _plain(out)[-OUTPUT_BYTES:], _plain(err)[-OUTPUT_BYTES:]) for _, id, out, err in owed]
            await there.write_outputs(registry, outputs)
            await db.note_outputs_written([row[0] for row in owed])
            written += len(owed)
        return written

    return await _tried(vo, seconds, write)


def _plain(text: str, longest: int | None = None) -> str:
    """Text in ASCII: nobody knows what the columns of the registry take, and MySQL mixes no character sets."""
    return sanitize(text.encode("ascii", "backslashreplace").decode())[:longest]


@dataclass(frozen=True)
class Difference:
    """A pilot that the two databases do not have alike; None: not there."""

    stamp: str
    vo: str
    ce_name: str
    pilot_id: int | None
    status: str | None
    """The status that the registry should have."""
    registry_id: int | None
    registry_status: str | None


@dataclass
class Reconciliation:
    """Comparison of the pilots here with those in the registry."""

    compared: int = 0
    missing: int = 0
    """Not in the registry."""
    different: int = 0
    """With another status there."""
    unknown: int = 0
    """Not ended there, at a compute element of ours, and unknown here. They are left alone."""
    mended: int = 0
    differences: list[Difference] = field(default_factory=list)
    """The first `LISTED`."""

    @property
    def remaining(self) -> int:
        """Number of differences that are left."""
        return self.missing + self.different + self.unknown - self.mended

    def add(self, difference: Difference) -> None:
        """List it, if there are not too many."""
        if len(self.differences) < LISTED:
            self.differences.append(difference)

    def as_dict(self) -> dict[str, Any]:
        """Fields as JSON."""
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
        db: our database.
        registry: the other one.
        vo: only this VO's; None: every VO's.
        apply: whether to write to the registry what it should have.
        progress: called with the number of pilots compared so far.

    Raises:
        Exception: of either database; what is mended stays so.
    """
    done, after = Reconciliation(), 0
    ces = {ce["name"]: ce for ce in await db.get_ces()}
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
            done.missing += entry is None
            done.different += entry is not None
            seen = (None, None) if entry is None else (entry.registry_id, entry.status)
            done.add(Difference(pilot.stamp, pilot.vo, pilot.ce_name, pilot.pilot_id, pilot.status, *seen))
        if apply and wrong:
            done.mended += await writer.write(wrong)
        done.compared += len(pilots)
        progress(done.compared)
    after, destinations = 0, {_destination(ce, name) for name, ce in ces.items()}
    while open_there := await there.list_open(registry, destinations, vo, after=after, limit=_BATCH):
        after = open_there[-1].registry_id
        known = await db.known_stamps({entry.stamp for entry in open_there})
        for entry in open_there:
            if entry.stamp not in known:
                done.unknown += 1
                seen = (entry.registry_id, entry.status)
                done.add(Difference(entry.stamp, entry.vo, entry.ce_name, None, None, *seen))
    return done


async def jobs_of_pilot(registry: PilotAgentsDB | None, pilot: Mapping[str, Any]) -> list[int] | None:
    """Ids of the jobs that ran on a pilot, the newest first; None: there is no registry, or it does not answer."""
    if registry is None:
        return None
    if (registry_id := pilot["registry_id"]) is None:
        return []
    try:
        return await _read(there.jobs_of(registry, registry_id, pilot["stamp"], limit=LISTED))
    except RegistryUnavailableError as error:
        logger.warning("The jobs of pilot %d are not known: %s", pilot["pilot_id"], error)
        return None


async def stamps_of_job(registry: PilotAgentsDB | None, job_id: int) -> list[str]:
    """Stamps of the pilots on which a job ran, whatever VO they are of.

    Raises:
        RegistryUnavailableError: there is no registry, or it does not answer.
    """
    if registry is None:
        raise RegistryUnavailableError(
            f"no pilot registry is configured here, and nothing else knows pilots of jobs: set "
            f"{there.REGISTRY_VARIABLE}"
        )
    return await _read(there.stamps_of(registry, job_id, limit=LISTED))


async def _read(answer: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(_READ_SECONDS):
            return await answer
    except TimeoutError as error:
        raise RegistryUnavailableError(f"the pilot registry gives no answer in {_READ_SECONDS} s") from error
    except Exception as error:
        described = describe(there.REGISTRY, error)
        public = "the pilot registry does not answer" if described is None else str(described)
        raise RegistryUnavailableError(explain(error), public) from error
