"""Decide how many pilots a VO should ask for, and remember what it has asked for."""

from __future__ import annotations

__all__ = ["REQUEST_LIFETIME", "request_pilots", "submit_requested_pilot", "withdraw_requests"]

from collections.abc import Collection
from datetime import UTC, datetime, timedelta

from gubbins.db.sql import MyPilotDB

from .submission import submit_pilot

REQUEST_LIFETIME = timedelta(minutes=15)
"""A request whose task has not started by then is given up: the task is taken for lost (a flushed Redis)."""


async def request_pilots(
    db: MyPilotDB,
    vo: str,
    *,
    vos: Collection[str],
    compute_elements: Collection[str] | None = None,
    all_but: Collection[str] = (),
) -> dict[str, int]:
    """Ask for pilots: how many the VO should submit now to each compute element with room.

    The answer is noted, and what is already on its way (of every VO) is taken off the room first, so that
    tasks do not pile up while workers are busy. `submit_requested_pilot` strikes a request out.

    A VO may take what is missing to its even share of a compute element, or else its part of what is free:
    the first VO of a round does not leave nothing for the others, and with one VO it is one per slot.

    Args:
        db: the database.
        vo: for which VO.
        vos: all VOs there are; those that the compute element serves share it.
        compute_elements: names of the only ones to look at; None: all.
        all_but: names of those not to look at.
    """
    asked: dict[str, int] = {}
    async with db.unit():
        pending = await db.pending_requests(since=datetime.now(tz=UTC) - REQUEST_LIFETIME)
        active = await db.count_active_pilots(vo=vo)
        for ce in await db.get_available_ces(vo):
            name, served = ce["name"], ce["vos"]
            if name in all_but or (compute_elements is not None and name not in compute_elements):
                continue
            sharers = len({vo, *(other for other in vos if served is None or other in served)})
            on_their_way = sum(count for (ce_name, _), count in pending.items() if ce_name == name)
            room = ce["available_slots"] - on_their_way
            mine = active.get(name, 0) + pending.get((name, vo), 0)
            share = -(-ce["capacity"] // sharers)
            count = min(room, max(share - mine, -(-room // sharers)))
            if count > 0:
                await db.add_requests(name, vo=vo, count=count)
                asked[name] = count
    return asked


async def submit_requested_pilot(db: MyPilotDB, ce_name: str, vo: str) -> int:
    """Submit one pilot that `request_pilots` asked for (or that nobody did); see `submit_pilot`."""
    await db.take_requests(ce_name, vo=vo)
    return await submit_pilot(db, ce_name, vo)


async def withdraw_requests(db: MyPilotDB, ce_name: str, vo: str, count: int) -> None:
    """Take back requests whose tasks could not be spawned."""
    await db.take_requests(ce_name, vo=vo, count=count)
