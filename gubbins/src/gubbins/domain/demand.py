"""Fair shares: the number of free slots for each VO. Pure functions."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

REQUEST_LIFETIME = timedelta(minutes=15)
"""Lifetime of a request, and of a VO's demand.

The task of an expired request submits nothing if it still starts; later rounds make new requests.
"""

MAX_REQUESTS = 50_000
"""Limit of pending requests at a compute element: a larger capacity is filled in several rounds."""

UNLIMITED = 2**31 - 1
"""Demand without a limit."""

_ONE_BY_ONE = 1_000
_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Sharer:
    """A VO that competes for slots of a compute element."""

    share: float  # relative to other VOs, > 0
    held: int  # active pilots and requests
    wanted: int  # further pilots
    granted_at: datetime | None = None  # time of the last granted slot


def fair_part(room: int, vo: str, sharers: Mapping[str, Sharer]) -> int:
    """Compute the number of free slots (`room`) for a VO.

    Slots are assigned one by one, each to the VO with the least slots per share that wants more; among equals, to
    the one that has waited longest. So a VO above its share gets only what others leave, and no VO starves.
    """
    room = max(0, room)
    if len(sharers) == 1:
        return min(room, sharers[vo].wanted)
    assigned = dict.fromkeys(sharers, 0)
    if room > _ONE_BY_ONE:
        # All but the last slots at once: those that make the most equal numbers of slots per share.
        level = 0.0
        for exponent in range(100, -54, -1):
            higher = level + 2.0**exponent
            if sum(_slots_at(higher, each) for each in sharers.values()) <= room:
                level = higher
        assigned = {name: max(0, _slots_at(level, each) - 1) for name, each in sharers.items()}
    # Webster's method, which favours neither large nor small shares.
    queue = [
        ((each.held + assigned[name] + 0.5) / each.share, each.granted_at or _NEVER, name)
        for name, each in sharers.items()
        if each.wanted > assigned[name]
    ]
    heapq.heapify(queue)
    for _ in range(room - sum(assigned.values())):
        if not queue:
            break
        _, granted_at, name = heapq.heappop(queue)
        each = sharers[name]
        assigned[name] += 1
        if assigned[name] < each.wanted:
            heapq.heappush(queue, ((each.held + assigned[name] + 0.5) / each.share, granted_at, name))
        elif name == vo:
            break
    return assigned[vo]


def _slots_at(level: float, each: Sharer) -> int:
    """Number of slots that a VO wants while it has less than `level` per share."""
    return min(each.wanted, max(0, math.floor(level * each.share - each.held + 0.5)))


def apportion(budget: int, parts: Sequence[int]) -> list[int]:
    """Reduce parts proportionally so that their sum does not exceed the budget."""
    total = sum(parts)
    if total <= budget:
        return list(parts)
    if budget <= 0:
        return [0] * len(parts)
    exact = [part * budget / total for part in parts]
    reduced = [math.floor(each) for each in exact]
    by_remainder = sorted(range(len(parts)), key=lambda index: exact[index] - reduced[index], reverse=True)
    for index in by_remainder[: budget - sum(reduced)]:
        reduced[index] += 1
    return reduced
