"""Requests of pilots: a VO's demand at each compute element, limited to its fair share."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.demand import Demand
from gubbins.domain import clock
from gubbins.domain.demand import MAX_REQUESTS, REQUEST_LIFETIME, UNLIMITED, Sharer, fair_part
from gubbins.domain.matching import TaskQueue, count_jobs, group_jobs, match, share_jobs
from gubbins.domain.pilot_states import CANCELLED_FOR, MyPilotStatus
from gubbins.domain.rules import CERules, DemandPolicy, rules_of, serves

from .circuits import half_open, quota_limit, submission_blocker

logger = logging.getLogger(__name__)

withdraw_requests = MyPilotDB.delete_requests


async def request_pilots(
    db: MyPilotDB,
    vo: str,
    *,
    vos: Collection[str],
    compute_elements: Collection[str] | None = None,
    all_but: Collection[str] = (),
    waiting_jobs: Callable[[], Awaitable[int | Sequence[TaskQueue] | None]] | None = None,
) -> dict[str, list[str]]:
    """Request pilots for a VO; return the stamps of the requests by compute element.

    Requests are recorded, and pending ones of all VOs reduce the free slots, so that tasks do not accumulate while
    workers are busy. `submit_requested_pilot` deletes a request.

    The rules of a compute element determine the VO's demand. Of the free slots the VO gets its fair share, given
    the last demand of the other VOs. While the demand of a VO is not known yet, it gets at most what is missing to
    its share, or its share of the free slots: the first VO of a round leaves slots for the others.

    Args:
        vos: all VOs; those that a compute element serves share it.
        compute_elements: restricts the request to these; None: all.
        all_but: compute elements to exclude.
        waiting_jobs: reads the VO's waiting jobs, by requirements, or only their number; called if rules need it.
            None, and the result None: not known; then the policy `waiting_jobs` requests only `trickle`.
    """
    known = {ce["name"]: ce for ce in await db.list_ces(vo=vo, serving=False)}
    if unknown := {*(compute_elements or ()), *all_but} - known.keys():
        logger.warning("Requests for %s name unknown compute elements: %s", vo, sorted(unknown))
    served = {name: ce for name, ce in known.items() if serves(ce["vos"], vo)}
    ces = {
        name: ce
        for name, ce in served.items()
        if ce["enabled"]
        and name not in all_but
        and (compute_elements is None or name in compute_elements)
        and submission_blocker(ce) is None
    }
    rules = {name: rules_of(ce).of(vo) for name, ce in served.items()}
    by_jobs = [name for name in ces if rules[name].policy is DemandPolicy.WAITING_JOBS]
    limited = [name for name, own in rules.items() if own.max_surplus_seconds is not None]
    jobs = await waiting_jobs() if (by_jobs or limited) and waiting_jobs is not None else None
    queues = [TaskQueue(jobs)] if isinstance(jobs, int) else jobs or ()
    groups = group_jobs(queues, rules)

    async def request() -> dict[str, list[str]]:
        situation = await _read_situation(db, vo, vos, served)
        without_pilot, without_job = match(groups, situation.waiting)
        unmatched = count_jobs(without_pilot)
        wanted = {name: situation.wanted(ces[name], rules[name], unmatched[name]) for name in ces}
        granted = {name: situation.part(ces[name], rules[name], wanted[name]) for name in ces}
        job_share, left = share_jobs(without_pilot, {name: granted[name] for name in by_jobs})
        for name in by_jobs:
            trickle = rules[name].trickle if situation.held[name, vo] == 0 else 0
            granted[name] = max(job_share[name], min(granted[name], trickle))
        demand, remaining = {}, count_jobs(left)
        for name in ces:
            more = wanted[name] - granted[name]
            more = min(more, remaining[name]) if name in by_jobs else more
            demand[name] = situation.next_demand(name, more, granted[name])
        await db.replace_demand(vo, demand)
        if jobs is not None:
            await _cancel_surplus(db, situation, rules, without_job)
        return await db.add_requests(vo, granted)

    return await db.run(request)


@dataclass(frozen=True)
class _Situation:
    """Pilots, requests and demand of all VOs at all compute elements."""

    vo: str
    vos: Collection[str]
    now: datetime
    held: Counter[tuple[str, str]]  # active pilots and requests, by (compute element, VO)
    submitted: Counter[tuple[str, str]]  # SUBMITTED pilots and requests, by (compute element, VO)
    requests: Counter[tuple[str, str]]  # by (compute element, VO)
    pending: Counter[str]  # requests of all VOs, by compute element
    active: Counter[str]  # active pilots of all VOs, by compute element
    demand: Mapping[tuple[str, str], Demand]
    waiting: Mapping[str, int]  # the VO's SUBMITTED pilots and requests that jobs can match, by compute element

    def wanted(self, ce: Mapping[str, Any], rules: CERules, budget: int) -> int:
        """Number of further pilots that the VO wants."""
        name = ce["name"]
        limit = UNLIMITED
        if rules.max_waiting is not None:
            limit = max(0, rules.max_waiting - self.submitted[name, self.vo])
        if rules.policy is DemandPolicy.FILL:
            return limit
        trickle = rules.trickle if self.held[name, self.vo] == 0 else 0
        return min(limit, max(budget, trickle))

    def part(self, ce: Mapping[str, Any], rules: CERules, wanted: int) -> int:
        """Number of wanted pilots that the VO gets now: its part of the free slots."""
        name = ce["name"]
        taken = self.active[name] + self.pending[name]
        room = min(ce["capacity"] - taken, MAX_REQUESTS - self.pending[name])
        if (limit := quota_limit(ce)) is not None:
            room = min(room, limit - (self.held[name, self.vo] if ce["circuits_of"] else taken))
        if rules.max_per_cycle is not None:
            wanted = min(wanted, rules.max_per_cycle)
        of_all = rules_of(ce)
        served = {self.vo, *(other for other in self.vos if serves(ce["vos"], other))}
        sharers = {self.vo: self._sharer(name, self.vo, rules.share, wanted)}
        demand_unknown = False
        for other in served - {self.vo}:
            known = self.demand.get((name, other))
            if known is None:
                demand_unknown = True
            elif known.requested_at > self.now - REQUEST_LIFETIME:
                sharers[other] = self._sharer(name, other, of_all.of(other).share, known.wanted)
        part = fair_part(room, self.vo, sharers)
        if demand_unknown:
            fraction = rules.share / sum(of_all.of(other).share for other in served)
            missing = math.ceil(ce["capacity"] * fraction) - self.held[name, self.vo]
            part = min(part, max(missing, math.ceil(room * fraction)))
        if half_open(ce):
            part = min(part, 1 - (self.requests[name, self.vo] if ce["circuits_of"] else self.pending[name]))
        return max(0, part)

    def _sharer(self, name: str, vo: str, share: float, wanted: int) -> Sharer:
        known = self.demand.get((name, vo))
        return Sharer(share, self.held[name, vo], wanted, None if known is None else known.granted_at)

    def next_demand(self, name: str, wanted: int, granted: int) -> Demand:
        """Demand of the VO to record after this round."""
        before = self.demand.get((name, self.vo))
        granted_at = self.now if granted > 0 else None if before is None else before.granted_at
        return Demand(max(0, wanted), self.now, granted_at, None if before is None else before.surplus_since)


async def _read_situation(
    db: MyPilotDB, vo: str, vos: Collection[str], served: Mapping[str, Mapping[str, Any]]
) -> _Situation:
    now = clock.now()
    requests = Counter(await db.pending_requests(since=now - REQUEST_LIFETIME))
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
    cancelling = await db.count_cancelling(vo)
    waiting = {
        name: count - cancelling.get(name, 0)
        for (name, owner), count in submitted.items()
        if owner == vo and name in served and served[name]["banned_at"] is None
    }
    return _Situation(vo, vos, now, held, submitted, requests, pending, active, await db.get_demand(), waiting)


async def _cancel_surplus(
    db: MyPilotDB, situation: _Situation, rules: Mapping[str, CERules], without_job: Mapping[str, int]
) -> None:
    """Cancel waiting pilots for which there have been no jobs for `max_surplus_seconds`."""
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
            logger.info("Cancelled %d waiting pilots of %s at %s: no jobs for them", len(cancelled), vo, name)
