"""Plan of submissions and failures, generated from the seed before the run."""

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
    "Once": 30,
    "Newer": 5,
    "Locked": 60,
    "LockedSmall": 40,
    "LockedTwice": 20,
    "Reads": 50,
    "Writes": 10,
    "Limited": 40,
    "Later": 50,
}
#: Of those that hold their lock for longer than a lease: one per so many seconds of disturbances, of each kind.
_LONG_EVERY_SECONDS = 3.0
#: Part of the duration in which they are submitted. A poison task has to end several workers to be recognised; a
#: newer one is delivered again after a while, until a worker of the newer version takes it.
_UNTIL = {"Kills": 0.3, "KillsLocked": 0.3, "Newer": 0.3}
_GROUPED = 150
_GROUP_SIZE = 10

#: Of the Redis servers (`redis_servers.py`), and of the dead letters (`databases.py`).
CONFIGURATIONS = ("none", "rdb", "everysec", "always", "sentinel", "sentinel-min-replicas")
DATABASES = ("sqlite", "mariadb", "postgresql")
#: Profile -> families of disturbances, and the servers that it runs on by default.
PROFILES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "processes": (("processes",), "none", "sqlite"),
    "net": (("net",), "none", "sqlite"),
    "server": (("server",), "always", "sqlite"),
    "sentinel": (("server",), "sentinel-min-replicas", "sqlite"),
    "sql": (("sql",), "none", "mariadb"),
    "all": (("processes", "net", "server", "sql"), "sentinel-min-replicas", "mariadb"),
}
#: Family -> least and greatest pause between two disturbances in seconds, and the weight of each.
_FAMILIES: dict[str, tuple[tuple[float, float], dict[str, int]]] = {
    "processes": (
        (0.6, 2.6),
        {
            "kill worker": 26,
            "pause worker": 16,
            "pause worker briefly": 12,
            "restart worker": 12,
            "kill scheduler": 8,
            "pause scheduler": 6,
            "restart scheduler": 4,
            "cut some connections": 12,
            "cut all connections": 4,
        },
    ),
    "net": (
        (0.6, 2.6),
        {
            "hold link": 24,
            "hold link to_server": 14,
            "hold link to_client": 14,
            "hold link briefly": 12,
            "delay link": 12,
            "cut link": 8,
            "cut link in a reply": 10,
            "half-close link": 6,
        },
    ),
    "server": (
        (5.0, 9.0),
        {"kill server": 40, "pause server": 30, "pause server briefly": 10, "restart server": 10, "power cut": 10},
    ),
    "sql": (
        (2.0, 4.0),
        {"kill database": 25, "pause database": 25, "hold database link": 25, "cut database link": 25},
    ),
}
#: How long a disturbance takes, in leases.
_LEASES = {
    "pause worker": (1.3, 2.0),
    "pause scheduler": (1.3, 2.0),
    "pause worker briefly": (0.05, 0.2),
    "hold link": (1.2, 3.0),
    "hold link to_server": (1.2, 3.0),
    "hold link to_client": (1.2, 3.0),
    "hold link briefly": (0.05, 0.2),
    "delay link": (0.5, 2.0),
    "kill server": (0.1, 1.5),
    "power cut": (0.1, 0.5),
    "pause server": (1.3, 2.0),
    "pause server briefly": (0.05, 0.3),
    "kill database": (0.1, 1.5),
    "pause database": (0.5, 2.0),
    "hold database link": (0.5, 2.0),
}
LONGEST_DELAY_SECONDS = 2.0
_QUIET_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Planned:
    """One task, or a group of them."""

    at: float
    """Seconds after the start at which it is submitted."""
    kind: str
    arguments: tuple[Any, ...]
    delay: float = 0.0
    """Seconds for which it is put off."""
    children: tuple[int, ...] = ()
    """Numbers of the tasks in its group; `arguments` are those of the callback then."""


@dataclass(frozen=True, slots=True)
class Disturbance:
    at: float
    what: str
    which: int
    """Picks the victim among those there are; or how many connections are cut."""
    seconds: float
    """Duration; 0: it is over at once."""
    delay_seconds: float = 0.0
    """By how much a delayed link is delayed."""


@dataclass(frozen=True, slots=True)
class Plan:
    submissions: list[Planned]
    disturbances: list[Disturbance]
    seconds: float

    @property
    def tasks(self) -> int:
        """Tasks that are submitted, with the callbacks of groups, which the system submits."""
        return sum(len(planned.children) + 1 for planned in self.submissions)


def make(*, seed: int, profile: str, seconds: float, number: int, workers: int, lease: float) -> Plan:
    """The same arguments give the same plan."""
    rng = random.Random(seed)
    kinds = [kind for kind, share in _SHARES.items() for _ in range(number * share // 1000)]
    if workers < 4:  # there is no worker of a newer version
        kinds = [kind for kind in kinds if kind != "Newer"]
    kinds += ["Rated"] * min(number * 40 // 1000, int(seconds * tasks.RATE / tasks.RATE_SECONDS * 0.7))
    kinds += ["LockedLong", "ReadsLong"] * max(2, int(seconds / _LONG_EVERY_SECONDS))
    families = PROFILES[profile][0]
    # Elsewhere lost workers would hide what is to be seen.
    killers = max(1, int(seconds / 60)) if "processes" in families else 0
    kinds += ["Kills"] * killers + ["KillsLocked"] * killers
    groups = number * _GROUPED // 1000 // _GROUP_SIZE
    kinds += ["GroupDone"] * groups
    kinds += ["Quick"] * max(0, number - len(kinds) - groups * (_GROUP_SIZE - 1))
    rng.shuffle(kinds)
    submissions = []
    numbers = iter(range(1, 10 * number))
    for kind in kinds:
        at = rng.uniform(0, seconds * _UNTIL.get(kind, 0.9))
        n, delay = next(numbers), 0.0
        children: tuple[int, ...] = ()
        arguments: tuple[Any, ...] = (n,)
        if kind == "Slow":
            arguments = (n, round(rng.uniform(0.2, 1.5), 3))
        elif kind in ("LockedLong", "ReadsLong"):
            # Beside shorter ones for the same keys.
            key = "chaos-rw-0" if kind == "ReadsLong" else "chaos-0"
            arguments = (n, key, round(lease * rng.uniform(1.1, 2.0), 3))
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
    disturbances = [
        each for family in families for each in _disturbances(rng, family, seconds, lease, len(families))
    ]
    return Plan(submissions, sorted(disturbances, key=lambda each: each.at), seconds)


def _disturbances(
    rng: random.Random, family: str, seconds: float, lease: float, families: int
) -> list[Disturbance]:
    """The more families there are, the rarer are the disturbances of each."""
    (least, greatest), weights = _FAMILIES[family]
    stretch = families**0.5
    found = []
    at = 1.0 + rng.uniform(0, least)
    while at < seconds - _QUIET_SECONDS:
        what = rng.choices([*weights], weights=[*weights.values()])[0]
        which = rng.randint(1, 6) if what == "cut some connections" else rng.randrange(1000)
        length = lease * rng.uniform(*_LEASES.get(what, (0.0, 0.0)))
        delay = rng.uniform(0, LONGEST_DELAY_SECONDS) if what == "delay link" else 0.0
        found.append(Disturbance(round(at, 3), what, which, round(length, 3), round(delay, 3)))
        at += rng.uniform(least, greatest) * stretch
    return found
