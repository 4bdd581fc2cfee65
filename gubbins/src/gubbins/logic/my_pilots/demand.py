"""Request pilots: compute a VO's demand and its fair share, and record both."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.demand import Demand
from gubbins.domain import clock
from gubbins.domain.demand import REQUEST_LIFETIME, UNLIMITED, Sharer, fair_part
from gubbins.domain.matching import TaskQueue, group_jobs, jobs_for, match, share_jobs
from gubbins.domain.pilot_states import CANCELLED_FOR, MyPilotStatus
from gubbins.domain.rules import CERules, DemandPolicy, rules_of, serves

from .circuits import half_open, quota_limit, submission_blocker

logger = logging.getLogger(__name__)


async def request_pilots(
    db: MyPilotDB,
    vo: str,
    *,
    vos: Collection[str],
    compute_elements: Collection[str] | None = None,
    all_but: Collection[str] = (),
    waiting_jobs: Callable[[], Awaitable[int | Sequence[TaskQueue] | None]] | None = None,
) -> dict[str, list[str]]:
    """Request pilots: those that the VO should submit now, by compute element, as the stamps of their requests.

    Requests are recorded, and those of every VO are subtracted from the room first, so that tasks do not pile up
    while workers are busy. `submit_requested_pilot` deletes a request.

    How many a VO wants is a matter of the compute element's rules. Of what is free it gets its fair part,
    beside the other VOs as they last asked; as long as one of them has never asked, no more than what is
    missing to its share, or else its share of what is free: the first VO of a round does not leave nothing
    for the others. With one VO it is one pilot per slot.

    Args:
        db: the database.
        vo: for which VO.
        vos: all VOs there are; those that the compute element serves share it.
        compute_elements: names of the only ones to look at; None: all.
        all_but: names of those not to look at.
        waiting_jobs: finds the waiting jobs of the VO, by what they require, or only their number; called only
            where rules say `waiting_jobs`. None, and the result None: not known, and only compute elements that
            are empty get pilots.
    """
    served = {ce["name"]: ce for ce in await db.get_ces() if serves(ce["vos"], vo)}
    ces = {
        name: ce
        for name, ce in served.items()
        if ce["enabled"]
        and name not in all_but
        and (compute_elements is None or name in compute_elements)
        and await submission_blocker(db, ce) is None
    }
    rules = {name: rules_of(ce).of(vo) for name, ce in served.items()}
    by_jobs = [name for name in ces if rules[name].policy is DemandPolicy.WAITING_JOBS]
    limited = [name for name, own in rules.items() if own.max_surplus_seconds is not None]
    jobs = await waiting_jobs() if (by_jobs or limited) and waiting_jobs is not None else None
    queues = [TaskQueue(jobs)] if isinstance(jobs, int) else jobs or ()
    groups = group_jobs(queues, rules)

    async def ask() -> dict[str, list[str]]:
        situation = await _look(db, vo, vos, served)
        without_pilot, without_job = match(groups, situation.waiting)
        wanted = {name: situation.wanted(ces[name], rules[name], jobs_for(name, without_pilot)) for name in ces}
        asked = {name: situation.part(ces[name], rules[name], wanted[name]) for name in ces}
        given, left = share_jobs(without_pilot, {name: asked[name] for name in by_jobs})
        for name in by_jobs:
            trickle = rules[name].trickle if situation.held[name, vo] == 0 else 0
            asked[name] = max(given[name], min(asked[name], trickle))
        demand = {}
        for name in ces:
            more = wanted[name] - asked[name]
            more = min(more, jobs_for(name, left)) if name in by_jobs else more
            demand[name] = situation.next_demand(name, more, asked[name])
        await db.put_demand(vo, demand)
        if jobs is not None:
            await _cancel_surplus(db, situation, rules, without_job)
        return {
            name: await db.add_requests(name, vo=vo, count=count) for name, count in asked.items() if count > 0
        }

    return await db.run(ask)


@dataclass(frozen=True)
class _Situation:
    """Slots held, requested and wanted, by compute element and VO."""

    vo: str
    vos: Collection[str]
    now: datetime
    held: Counter[tuple[str, str]]  # by (compute element, VO): pilots and requests
    submitted: Counter[tuple[str, str]]  # pilots that wait, and requests
    pending: Counter[str]  # requests of all VOs, by compute element
    active: Counter[str]  # pilots of all VOs, by compute element
    demand: Mapping[tuple[str, str], Demand]
    waiting: Mapping[str, int]  # the VO's pilots that wait, and its requests, wherever jobs may still reach them

    def wanted(self, ce: Mapping[str, Any], rules: CERules, budget: int) -> int:
        """Further pilots that the VO wants, without regard to the others."""
        name = ce["name"]
        limit = UNLIMITED
        if rules.max_waiting is not None:
            limit = max(0, rules.max_waiting - self.submitted[name, self.vo])
        if rules.policy is DemandPolicy.FILL:
            return limit
        trickle = rules.trickle if self.held[name, self.vo] == 0 else 0
        return min(limit, max(budget, trickle))

    def part(self, ce: Mapping[str, Any], rules: CERules, wanted: int) -> int:
        """Number of them that it gets now."""
        name = ce["name"]
        limit = quota_limit(ce)
        room = (ce["capacity"] if limit is None else limit) - self.active[name] - self.pending[name]
        if half_open(ce):
            room = min(room, 1 - self.pending[name])
        if rules.max_per_cycle is not None:
            wanted = min(wanted, rules.max_per_cycle)
        of_all = rules_of(ce)
        served = {self.vo, *(other for other in self.vos if serves(ce["vos"], other))}
        sharers = {self.vo: self._sharer(name, self.vo, rules.share, wanted)}
        strangers = False
        for other in served - {self.vo}:
            known = self.demand.get((name, other))
            if known is None:
                strangers = True
            elif known.requested_at > self.now - REQUEST_LIFETIME:
                sharers[other] = self._sharer(name, other, of_all.of(other).share, known.wanted)
        part = fair_part(room, self.vo, sharers)
        if strangers:
            fraction = rules.share / sum(of_all.of(other).share for other in served)
            missing = _rounded_up(ce["capacity"] * fraction) - self.held[name, self.vo]
            part = min(part, max(missing, _rounded_up(room * fraction)))
        return max(0, part)

    def _sharer(self, name: str, vo: str, share: float, wanted: int) -> Sharer:
        known = self.demand.get((name, vo))
        return Sharer(share, self.held[name, vo], wanted, None if known is None else known.granted_at)

    def next_demand(self, name: str, wanted: int, granted: int) -> Demand:
        """The VO's demand to record after this round."""
        before = self.demand.get((name, self.vo))
        granted_at = self.now if granted > 0 else None if before is None else before.granted_at
        return Demand(max(0, wanted), self.now, granted_at, None if before is None else before.surplus_since)


async def _look(
    db: MyPilotDB, vo: str, vos: Collection[str], served: Mapping[str, Mapping[str, Any]]
) -> _Situation:
    now = clock.now()
    requests = await db.pending_requests(since=now - REQUEST_LIFETIME)
    slots = await db.count_slots()
    held, submitted = Counter(requests), Counter(requests)
    pending: Counter[str] = Counter()
    active: Counter[str] = Counter()
    for (name, _), count in requests.items():
        pending[name] += count
    for (name, owner), states in slots.items():
        held[name, owner] += sum(states.values())
        submitted[name, owner] += states.get(MyPilotStatus.SUBMITTED, 0)
        active[name] += sum(states.values())
    leaving = await db.count_leaving(vo)
    waiting = {
        name: count - leaving.get(name, 0)
        for (name, owner), count in submitted.items()
        if owner == vo and name in served and served[name]["banned_at"] is None
    }
    return _Situation(vo, vos, now, held, submitted, pending, active, await db.get_demand(), waiting)


async def _cancel_surplus(
    db: MyPilotDB, situation: _Situation, rules: Mapping[str, CERules], without_job: Mapping[str, int]
) -> None:
    """Cancel pilots that wait although there has been no job for them for as long as the rules allow."""
    vo, now = situation.vo, situation.now
    for name, own in rules.items():
        if own.max_surplus_seconds is None or own.policy is not DemandPolicy.WAITING_JOBS:
            continue
        surplus = without_job.get(name, 0) - own.trickle
        since = known.surplus_since if (known := situation.demand.get((name, vo))) else None
        if surplus <= 0:
            if since is not None:
                await db.set_surplus_since(name, vo, None)
        elif since is None:
            await db.set_surplus_since(name, vo, now)
        elif since < (before := now - timedelta(seconds=own.max_surplus_seconds)):
            reason = f"{CANCELLED_FOR}no job has waited for it since {since:%Y-%m-%d %H:%M:%S} UTC"
            cancelled = await db.cancel_oldest_waiting(
                name, vo, submitted_before=before, count=surplus, reason=reason
            )
            logger.info("Cancelled %d pilots of %s at %s: more wait than jobs justify", len(cancelled), vo, name)


def _rounded_up(number: float) -> int:
    return -int(-number // 1)


async def withdraw_requests(db: MyPilotDB, ce_name: str, stamps: Sequence[str]) -> None:
    """Delete requests whose tasks could not be spawned."""
    await db.delete_requests(ce_name, stamps)
