"""Fair shares: how many free slots each VO gets. Arithmetic only."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

REQUEST_LIFETIME = timedelta(minutes=15)
"""Lifetime of a request, and of a VO's demand. The task of an older request is taken for lost (a flushed Redis).

Should it start after all, it finds no request, and submits nothing: later rounds have requested again.
"""

UNLIMITED = 2**31 - 1
"""So many pilots are wanted where nothing limits them."""

_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Sharer:
    """A VO at a compute element."""

    share: float  # relative to those of the others, > 0
    held: int  # slots that it has, or that are on their way to it
    wanted: int  # how many more it would take
    granted_at: datetime | None = None  # when it last got a slot


def fair_part(room: int, vo: str, sharers: Mapping[str, Sharer]) -> int:
    """Number of the free slots that this VO gets.

    The slots are dealt out one by one, each to the VO that has least for its share and still wants more; of
    equals, to the one that has been waiting longest. So a VO that holds more than its share gets what the
    others leave, and no VO is passed over for ever, however few slots there are.
    """
    room = max(0, room)
    mine = sharers[vo]
    if len(sharers) == 1:
        return min(room, mine.wanted)
    # Webster's divisors: no sharer is favoured for being large or small.
    queue = [
        ((each.held + 0.5) / each.share, each.granted_at or _NEVER, name)
        for name, each in sharers.items()
        if each.wanted > 0
    ]
    heapq.heapify(queue)
    dealt = dict.fromkeys(sharers, 0)
    for _ in range(room):
        if not queue:
            break
        _, granted_at, name = heapq.heappop(queue)
        each = sharers[name]
        dealt[name] += 1
        if dealt[name] < each.wanted:
            heapq.heappush(queue, ((each.held + dealt[name] + 0.5) / each.share, granted_at, name))
        elif name == vo:
            break
    return dealt[vo]


def apportion(budget: int, parts: Sequence[int]) -> list[int]:
    """Cut parts down, in proportion, until together they are no more than the budget."""
    total = sum(parts)
    if total <= budget:
        return list(parts)
    if budget <= 0:
        return [0] * len(parts)
    exact = [part * budget / total for part in parts]
    given = [math.floor(each) for each in exact]
    by_remainder = sorted(range(len(parts)), key=lambda index: exact[index] - given[index], reverse=True)
    for index in by_remainder[: budget - sum(given)]:
        given[index] += 1
    return given
