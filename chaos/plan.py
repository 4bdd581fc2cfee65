"""What will be submitted and what will go wrong, and when: all of it from the seed, before anything starts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from . import tasks

#: Shares of the tasks, in per mille; groups and quick ones make up the rest.
_SHARES = {
    "Urgent": 100,
    "Slow": 40,
    "Flaky": 20,
    "Failing": 10,
    "Locked": 60,
    "LockedSmall": 40,
    "LockedTwice": 20,
    "Reads": 50,
    "Writes": 10,
    "Limited": 40,
    "Later": 50,
}
_GROUPED = 150
_GROUP_SIZE = 10
#: Share of each disturbance, in per cent.
_DISTURBANCES = {
    "kill worker": 26,
    "pause worker": 16,
    "pause worker briefly": 12,
    "restart worker": 12,
    "kill scheduler": 8,
    "pause scheduler": 6,
    "restart scheduler": 4,
    "cut some connections": 12,
    "cut all connections": 4,
}
_QUIET_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Planned:
    """One task, or a group of them."""

    at: float
    """Seconds after the start at which it is submitted."""
    kind: str
    arguments: tuple[Any, ...]
    delay: float = 0.0
    """Seconds for which it is put aside."""
    children: tuple[int, ...] = ()
    """Numbers of the tasks in its group; `arguments` are those of the callback then."""


@dataclass(frozen=True, slots=True)
class Disturbance:
    at: float
    what: str
    which: int
    """Index of the victim, or how many connections."""
    seconds: float
    """How long a pause takes."""


@dataclass(frozen=True, slots=True)
class Plan:
    submissions: list[Planned]
    disturbances: list[Disturbance]
    seconds: float

    @property
    def tasks(self) -> int:
        """Tasks that are submitted, with the callbacks of groups, which the system submits."""
        return sum(len(planned.children) + 1 for planned in self.submissions)


def make(*, seed: int, seconds: float, number: int, workers: int, schedulers: int, lease: float) -> Plan:
    """The same arguments give the same plan."""
    rng = random.Random(seed)
    kinds = [kind for kind, share in _SHARES.items() for _ in range(number * share // 1000)]
    kinds += ["Rated"] * min(number * 40 // 1000, int(seconds * tasks.RATE / tasks.RATE_SECONDS * 0.7))
    killers = max(1, int(seconds / 60))
    kinds += ["Kills"] * killers + ["KillsLocked"] * killers
    groups = number * _GROUPED // 1000 // _GROUP_SIZE
    kinds += ["GroupDone"] * groups
    kinds += ["Quick"] * max(0, number - len(kinds) - groups * (_GROUP_SIZE - 1))
    rng.shuffle(kinds)
    submissions = []
    numbers = iter(range(1, 10 * number))
    for kind in kinds:
        # Killers come early: each needs several deaths to be found out.
        at = rng.uniform(0, seconds * (0.3 if kind.startswith("Kills") else 0.9))
        n, delay = next(numbers), 0.0
        children: tuple[int, ...] = ()
        arguments: tuple[Any, ...] = (n,)
        if kind == "Slow":
            arguments = (n, round(rng.uniform(0.2, 1.5), 3))
        elif kind.startswith(("Locked", "KillsLocked")):
            first, second = rng.sample(range(10), 2)
            arguments = (n, f"chaos-{first}+chaos-{second}" if kind == "LockedTwice" else f"chaos-{first}")
        elif kind in ("Reads", "Writes"):
            arguments = (n, f"chaos-rw-{rng.randrange(3)}")
        elif kind == "Later":
            delay = rng.uniform(0.5, max(1.0, seconds / 6))
        elif kind == "GroupDone":
            children = tuple(next(numbers) for _ in range(_GROUP_SIZE))
        submissions.append(Planned(at, kind, arguments, delay, children))
    submissions.sort(key=lambda planned: planned.at)
    return Plan(submissions, _disturbances(rng, seconds, workers, schedulers, lease), seconds)


def _disturbances(
    rng: random.Random, seconds: float, workers: int, schedulers: int, lease: float
) -> list[Disturbance]:
    found = []
    at = 1.0
    while at < seconds - _QUIET_SECONDS:
        what = rng.choices([*_DISTURBANCES], weights=[*_DISTURBANCES.values()])[0]
        which = rng.randrange(schedulers if "scheduler" in what else workers)
        if what == "cut some connections":
            which = rng.randint(1, 6)
        # Past the lease, so that others take over; or too short to be noticed by anybody.
        pause = lease * (rng.uniform(0.05, 0.2) if "briefly" in what else rng.uniform(1.3, 2.0))
        found.append(Disturbance(round(at, 3), what, which, round(pause, 3)))
        at += rng.uniform(0.6, 2.6)
    return found
