"""Rules of the protocol that are in force, and the number of disturbances."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """Without one of the first two the search must find a violation."""

    lease_timer: bool = True
    """A worker ends what holds a lock before its lease does."""
    another_term: bool = True
    """A server that was away gives every lease another term."""
    disturbances: int = 1
    only: str = ""
    """One kind of disturbance; all of them by default."""
    tasks: tuple[str, ...] = ("t0", "t1", "t2")
    """Tasks in the queue at first; the others have been settled before."""


KINDS = ("dies", "is paused", "is cut off", "an answer is lost", "the server is away")
