"""Rules of the protocol that are enabled, and the number of failures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """Without one of the first two the search must find a violation."""

    lease_timer: bool = True
    """A worker stops tasks that hold a lock before its lease expires."""
    new_leases: bool = True
    """After an outage, the server gives every worker a new lease."""
    disturbances: int = 1
    only: str = ""
    """One kind of disturbance; all of them by default."""
    tasks: tuple[str, ...] = ("t0", "t1", "t2")
    """Tasks in the queue at first; the others have been settled before."""


KINDS = ("crashes", "is paused", "is disconnected", "a reply is lost", "the server is unavailable")
