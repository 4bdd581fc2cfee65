"""Limits of submissions: the rules of a compute element, checked in the transaction that reserves a slot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, select, union_all

from gubbins.domain import clock
from gubbins.domain.demand import REQUEST_LIFETIME, Sharer, fair_part
from gubbins.domain.exceptions import NoRoomError, SubmissionLimitError
from gubbins.domain.pilot_states import ACTIVE, MyPilotStatus
from gubbins.domain.rules import CERules, rules_of, serves

from .demand import Demand, DemandMixin
from .schema import Pilots

CYCLE_SECONDS = 60
"""Period of `max_per_cycle` for pilots that were not requested by a round."""


async def check_limits(db: DemandMixin, ce: Mapping[str, Any], vo: str) -> None:
    """Check the rules for one more pilot of the VO. The caller has locked the row of the compute element.

    Raises:
        SubmissionLimitError: a rule refuses it.
        NoRoomError: no slot is free.
    """
    name, now = ce["name"], clock.now()
    all_rules = rules_of(ce)
    rules = all_rules.of(vo)
    pilots = {owner: states for (_, owner), states in (await db.count_slots(name)).items()}
    pending = await db.count_requests(since=now - REQUEST_LIFETIME, ce_name=name)
    held = Counter({owner: count for (_, owner), count in pending.items()})
    own_requests, requests = held[vo], held.total()
    check_max_waiting(name, vo, rules, pilots.get(vo, {}).get(MyPilotStatus.SUBMITTED, 0) + own_requests)
    if rules.max_per_cycle is not None:
        await _check_cycle(db, name, vo, rules.max_per_cycle, own_requests, now)
    for owner, states in pilots.items():
        held[owner] += sum(states.values())
    promised = requests - own_requests
    free = ce["capacity"] - held.total() + own_requests
    if free < 1:
        raise NoRoomError(name, ce["capacity"], promised)
    demand = {owner: each for (_, owner), each in (await db.get_demand(name)).items()}
    sharers = _other_sharers(ce, vo, all_rules, held, demand, now)
    if not sharers:
        return
    own = Sharer(rules.share, held.get(vo, 0), 1, demand[vo].granted_at if vo in demand else None)
    if fair_part(free - own_requests, vo, {**sharers, vo: own}) < 1:
        parts = rules.share + sum(each.share for each in sharers.values())
        raise SubmissionLimitError(
            name,
            vo,
            "share",
            rules.share,
            f"with {own.held} of {ce['capacity']} slots it has its share, and other VOs want the rest "
            f"({rules.share:g} of {parts:g})",
        )


def check_max_waiting(name: str, vo: str, rules: CERules, waiting: int) -> None:
    """Check `max_waiting`.

    Raises:
        SubmissionLimitError: the limit is reached.
    """
    if rules.max_waiting is not None and waiting >= rules.max_waiting:
        raise SubmissionLimitError(name, vo, "max_waiting", rules.max_waiting, f"{waiting} wait or are requested")


async def _check_cycle(db: DemandMixin, name: str, vo: str, limit: int, requested: int, now: datetime) -> None:
    since = now - timedelta(seconds=CYCLE_SECONDS)
    own = (Pilots.ce_name == name, Pilots.vo == vo, Pilots.submitted_at > since)
    # All recently submitted pilots are active or have recently ended: two reads, each with an index.
    recent = union_all(
        select(Pilots.submitted_at.label("at")).where(*own, Pilots.status.in_(ACTIVE)),
        select(Pilots.submitted_at.label("at")).where(*own, Pilots.ended_at > since),
    ).subquery()
    count, first = (await db.conn.execute(select(func.count(), func.min(recent.c.at)))).one()
    submitted = int(count) + requested
    if submitted >= limit:
        left = CYCLE_SECONDS if first is None else CYCLE_SECONDS - (now - first).total_seconds()
        raise SubmissionLimitError(
            name,
            vo,
            "max_per_cycle",
            limit,
            f"{submitted} were submitted within {CYCLE_SECONDS} s or are requested",
            retry_after_seconds=max(1, round(left)),
        )


def _other_sharers(
    ce: Mapping[str, Any],
    vo: str,
    rules: CERules,
    held: Mapping[str, int],
    demand: Mapping[str, Demand],
    now: datetime,
) -> dict[str, Sharer]:
    """Other VOs that compete for slots: those with demand, and named VOs whose demand is not known."""
    sharers = {}
    for other in {*demand, *(ce["vos"] or ()), *rules.vos} - {vo}:
        own = rules.of(other)
        wanted = ce["capacity"] if own.max_waiting is None else min(ce["capacity"], own.max_waiting)
        granted_at = None
        if (own_demand := demand.get(other)) is not None:
            wanted = own_demand.wanted if own_demand.requested_at > now - REQUEST_LIFETIME else 0
            granted_at = own_demand.granted_at
        if wanted > 0 and serves(ce["vos"], other):
            sharers[other] = Sharer(own.share, held.get(other, 0), wanted, granted_at)
    return sharers
