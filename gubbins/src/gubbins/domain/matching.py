"""Matching of waiting jobs with compute elements and pilots. Pure functions."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TypeAlias

from .demand import apportion
from .rules import CERules

_MB_PER_GB = 1024
_MAX_STEPS = 2_000_000  # compute elements; less than a second


@dataclass(frozen=True, slots=True)
class TaskQueue:
    """Waiting jobs of one VO with the same requirements; an empty set is no requirement."""

    jobs: int
    cpu_seconds: int = 0
    sites: frozenset[str] = frozenset()
    banned_sites: frozenset[str] = frozenset()
    grid_ces: frozenset[str] = frozenset()
    platforms: frozenset[str] = frozenset()
    job_types: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()


def unless_any(values: Collection[str]) -> frozenset[str]:
    """The values; none if they include DIRAC's wildcard `ANY`."""
    return frozenset() if _have_any(values) else frozenset(values)


def _have_any(values: Collection[str]) -> bool:
    return any(value.lower() == "any" for value in values)


@dataclass(frozen=True, slots=True)
class _Resource:
    name: str
    site: str | None
    platforms: frozenset[str]
    job_types: frozenset[str]
    tags: frozenset[str] | None  # None: all
    required_tags: frozenset[str]
    cpu_seconds: int | None

    def serves(self, queue: TaskQueue) -> bool:
        return (
            (not queue.sites or self.site in queue.sites)
            and self.site not in queue.banned_sites
            and (not queue.grid_ces or self.name in queue.grid_ces)
            and not (queue.platforms and self.platforms and queue.platforms.isdisjoint(self.platforms))
            and not (queue.job_types and self.job_types and queue.job_types.isdisjoint(self.job_types))
            and (self.tags is None or queue.tags <= self.tags)
            and self.required_tags <= queue.tags
            and (self.cpu_seconds is None or queue.cpu_seconds <= self.cpu_seconds)
        )


def tags_of(rules: CERules) -> frozenset[str]:
    """Tags of jobs that a pilot can run: those of the rules, and those that DIRAC derives from its size.

    A pilot with 4 processors takes jobs for 2, 3 and 4 (`4Processors`), and for as many as there are
    (`MultiProcessor`); one with 8 GB of memory takes jobs for 1 to 8 (`8GB`).
    """
    tags = set(rules.tags) | set(rules.required_tags)
    if rules.processors > 1:
        tags |= {"MultiProcessor", *(f"{number}Processors" for number in range(2, rules.processors + 1))}
    if rules.max_memory_mb:
        tags |= {f"{number}GB" for number in range(1, rules.max_memory_mb // _MB_PER_GB + 1)}
    return frozenset(tags)


Group: TypeAlias = frozenset[str]
"""Names of all compute elements that can run some jobs."""


def group_jobs(queues: Iterable[TaskQueue], ces: Mapping[str, CERules]) -> dict[Group, int]:
    """Count a VO's waiting jobs by the set of compute elements that can run them, without the empty set.

    Args:
        queues: waiting jobs of the VO.
        ces: compute elements that serve the VO, with their rules for it.
    """
    resources = {
        name: _Resource(
            rules.grid_ce or name,
            rules.site,
            unless_any(rules.platform),
            unless_any(rules.job_types),
            None if _have_any(rules.tags) else tags_of(rules),
            unless_any(rules.required_tags),
            rules.max_cpu_seconds,
        )
        for name, rules in ces.items()
    }
    groups: Counter[Group] = Counter()
    for queue in queues:
        served = frozenset(name for name, resource in resources.items() if resource.serves(queue))
        if served and queue.jobs > 0:
            groups[served] += queue.jobs
    return dict(groups)


def match(
    groups: Mapping[Group, int], pilots: Mapping[str, int], *, max_steps: int = _MAX_STEPS
) -> tuple[dict[Group, int], dict[str, int]]:
    """Match waiting pilots with jobs: as many as can be, one each (a maximum flow).

    Args:
        groups: jobs, by the compute elements that could serve them.
        pilots: pilots that wait, by compute element.
        max_steps: limit of the search, for thousands of groups; after it, matched jobs do not move any more.

    Returns:
        The jobs without a pilot, and the pilots without a job.
    """
    jobs, free = dict(groups), {name: number for name, number in pilots.items() if number > 0}
    taken: dict[str, Counter[Group]] = defaultdict(Counter)  # by compute element
    hopeless: set[str] = set()
    steps = iter(range(max_steps))
    for group in sorted(jobs, key=lambda group: (len(group), sorted(group))):
        while jobs[group] and (path := _path(group, free, taken, hopeless, steps)) is not None:
            # Augmenting path: the group's jobs move to the first compute element, each element's jobs to the next.
            moves = [(ce, next_ce, other) for (ce, _), (next_ce, other) in pairwise(path)]
            moved = min(jobs[group], free[path[-1][0]], *(taken[ce][other] for ce, _, other in moves))
            jobs[group] -= moved
            free[path[-1][0]] -= moved
            taken[path[0][0]][group] += moved
            for ce, next_ce, other in moves:
                taken[ce][other] -= moved
                taken[next_ce][other] += moved
    return {group: number for group, number in jobs.items() if number}, free


_Path: TypeAlias = list[tuple[str, Group]]
"""Path to a compute element with a free pilot; each but the first with jobs of the previous one that can move."""


def _path(
    group: Group,
    free: Mapping[str, int],
    taken: Mapping[str, Mapping[Group, int]],
    hopeless: set[str],
    steps: Iterator[int],
) -> _Path | None:
    """Find the shortest path to a free pilot; None: there is none, and visited nodes are added to `hopeless`."""
    came: dict[str, tuple[str | None, Group]] = dict.fromkeys(sorted(group - hopeless), (None, group))
    waiting = deque(came)
    found = next((ce for ce in came if free.get(ce)), None)
    while waiting and found is None:
        ce = waiting.popleft()
        for other, number in taken[ce].items():
            if next(islice(steps, len(other) - 1, None), None) is None:
                waiting.clear()
                break
            for next_ce in sorted(other.difference(came, hopeless)) if number else ():
                came[next_ce] = ce, other
                waiting.append(next_ce)
                found = found or (next_ce if free.get(next_ce) else None)
            if found is not None:
                break
    if found is None:
        hopeless |= came.keys()
        return None
    path: _Path = []
    step: str | None = found
    while step is not None:
        before, other = came[step]
        path.append((step, other))
        step = before
    return path[::-1]


def share_jobs(groups: Mapping[Group, int], room: Mapping[str, int]) -> tuple[dict[str, int], dict[Group, int]]:
    """Distribute jobs among compute elements that can run them, in proportion to their room.

    Jobs that few compute elements can run come first.

    Returns:
        Number of jobs by compute element, at most its room; and the remaining jobs.
    """
    given, left = dict.fromkeys(room, 0), dict(groups)
    for group in sorted(groups, key=lambda group: (len(group), sorted(group))):
        names = sorted(group & room.keys())
        parts = apportion(left[group], [room[name] - given[name] for name in names])
        for name, part in zip(names, parts, strict=True):
            given[name] += part
        left[group] -= sum(parts)
    return given, left


def count_jobs(groups: Mapping[Group, int]) -> Counter[str]:
    """Count the jobs that each compute element can run."""
    jobs: Counter[str] = Counter()
    for group, number in groups.items():
        for name in group:
            jobs[name] += number
    return jobs
