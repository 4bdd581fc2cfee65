"""Downtimes of compute elements: add, list, remove, import from DiracX's resource status."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.schema import MAX_REASON_CHARS
from gubbins.domain import clock
from gubbins.domain.downtimes import Downtime, downtime_error
from gubbins.domain.exceptions import DowntimeError, DowntimeNotFoundError
from gubbins.domain.rules import rules_of
from gubbins.domain.text import one_line

from .compute_elements import get_ce

if TYPE_CHECKING:
    from diracx.db.sql import ResourceStatusDB

logger = logging.getLogger(__name__)

RESOURCE_STATUS = "resource status"
"""Source of downtimes that were imported from DiracX."""

IMPORT_LIFETIME = timedelta(hours=1)
"""Lifetime of an imported downtime; each import renews it."""

_CORRECTED_WITHIN = timedelta(minutes=15)
_TIMEOUT_SECONDS = 30
_DOWN = ("Banned", "Error")


async def add_downtime(
    db: MyPilotDB,
    ce_name: str,
    starts_at: datetime,
    ends_at: datetime,
    reason: str,
    *,
    by: str,
    drain: timedelta = timedelta(),
) -> Downtime:
    """Plan a downtime: no submissions and no alerts from its start to its end.

    Args:
        by: user, for the record.
        drain: time before the start in which nothing is submitted, so that pilots end in time.

    Raises:
        DowntimeError: invalid times, or no reason.
        UnknownCEError: there is no such compute element.
    """
    if (problem := downtime_error(starts_at, ends_at, drain, clock.now())) is not None:
        raise DowntimeError(problem)
    reason = one_line(reason, MAX_REASON_CHARS)
    if not reason:
        raise DowntimeError("a downtime needs a reason")
    starts_at, ends_at = starts_at.astimezone(UTC), ends_at.astimezone(UTC)
    return await db.add_downtime(Downtime(0, ce_name, starts_at, ends_at, starts_at - drain, reason, by, None))


async def list_downtimes(
    db: MyPilotDB, ce_name: str | None = None, vo: str | None = None, *, past: bool = False
) -> list[Downtime]:
    """List downtimes that have not ended (`past`: all), the earliest first.

    Args:
        ce_name: only of this compute element.
        vo: only of compute elements that serve this VO.

    Raises:
        UnknownCEError: there is no such compute element, or it does not serve the VO.
    """
    if ce_name is not None:
        await get_ce(db, ce_name, vo)
    found = await db.get_downtimes(ends_after=None if past else clock.now(), ce_name=ce_name)
    if vo is None:
        return found
    served = {ce["name"] for ce in await db.list_ces(vo=vo)}
    return [downtime for downtime in found if downtime.ce_name in served]


async def ces_in_downtime(db: MyPilotDB, since: datetime) -> set[str]:
    """Names of the compute elements that are in downtime, or were since `since`."""
    now = clock.now()
    return {each.ce_name for each in await db.get_downtimes(ends_after=since) if each.starts_at <= now}


async def remove_downtime(db: MyPilotDB, downtime_id: int, ce_name: str | None = None) -> Downtime:
    """Remove a downtime, and return it.

    If it has started, it ends, and stays for the alerts about failures in it; if only just, it was a mistake.

    Raises:
        DowntimeNotFoundError: there is no such downtime (of this compute element, if given), or it has ended.
    """

    async def remove() -> Downtime:
        downtime, now = await db.get_downtime(downtime_id), clock.now()
        if downtime.ends_at <= now or ce_name not in (None, downtime.ce_name):
            raise DowntimeNotFoundError(downtime_id)
        if downtime.starts_at <= now - _CORRECTED_WITHIN:
            await db.set_downtime_end([downtime_id], now)
        else:
            await db.delete_downtime(downtime_id)
        return downtime

    return await db.run(remove)


async def import_downtimes(db: MyPilotDB, resource_status_db: ResourceStatusDB) -> dict[str, str]:
    """Import downtimes from DiracX's resource status: compute elements that are down for all VOs.

    A compute element that is banned there, or whose site is, gets a downtime that ends with the ban, or after
    `IMPORT_LIFETIME` without an import. Downtimes that users have added do not change. Opens a short transaction
    of `resource_status_db`.

    Returns:
        The reasons, by compute element.

    Raises:
        DowntimeError: the resource status cannot be read; imported downtimes stay until they expire.
    """
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS), resource_status_db:
            sites = await resource_status_db.get_site_statuses()
            resources = await resource_status_db.get_resource_statuses(element_type="ComputeElement")
    except Exception as error:
        raise DowntimeError(f"the resource status of DiracX cannot be read: {one_line(error)}") from error
    # As in DIRAC, case is ignored, and no VO means all.
    rows = [
        (name, row, vo) for vo, named in resources.items() for name, own in named.items() for row in own.values()
    ]
    down = {
        name: f"{status} in DiracX: {reason}"
        for name, status, reason, vo in (*sites, *((name, row.Status, row.Reason, vo) for name, row, vo in rows))
        if status.capitalize() in _DOWN and (vo or "all").lower() == "all"
    }
    ces = {}
    for ce in await db.list_ces():
        rules = rules_of(ce)
        names = (ce["name"], rules.grid_ce, rules.site)
        if (why := next((down[name] for name in names if name in down), None)) is not None:
            ces[ce["name"]] = one_line(why, MAX_REASON_CHARS)

    async def write() -> None:
        await db.lock_ces()
        now = clock.now()
        known = {
            downtime.ce_name: downtime
            for downtime in await db.get_downtimes(ends_after=now)
            if downtime.source == RESOURCE_STATUS
        }
        await db.set_downtime_end([d.id for name, d in known.items() if name in ces], now + IMPORT_LIFETIME)
        await db.set_downtime_end([d.id for name, d in known.items() if name not in ces], now)
        for name in ces.keys() - known.keys():
            ends_at = now + IMPORT_LIFETIME
            await db.add_downtime(Downtime(0, name, now, ends_at, now, ces[name], "import", RESOURCE_STATUS))

    await db.run(write)
    return ces
