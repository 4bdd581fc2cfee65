"""State machine of pilots: SUBMITTED → RUNNING → DONE or FAILED."""

from __future__ import annotations

from enum import StrEnum


class MyPilotStatus(StrEnum):
    """State of a pilot."""

    SUBMITTED = "SUBMITTED"
    RUNNING = "RUNNING"
    DONE = "DONE"
    FAILED = "FAILED"


ACTIVE = (MyPilotStatus.SUBMITTED, MyPilotStatus.RUNNING)
"""States in which a pilot takes a slot of its compute element."""

PREDECESSOR = {
    MyPilotStatus.RUNNING: MyPilotStatus.SUBMITTED,
    MyPilotStatus.DONE: MyPilotStatus.RUNNING,
    MyPilotStatus.FAILED: MyPilotStatus.RUNNING,
}
"""Transitions: the state from which each state is entered."""

CANCELLED_FOR = "cancelled, for "
"""Prefix of the last error of pilots cancelled by a rule, which is kept as the reason of their end."""
CANCELLED_OVERDUE = f"{CANCELLED_FOR}it "
"""Prefix for those that waited or ran too long, the only cancelled pilots that count as failures."""


class PilotOutcome(StrEnum):
    """Outcome reported by the pilot itself; its final state is reported by its compute element."""

    WORKED = "worked"
    NO_WORK = "no work"
    NODE_UNFIT = "node unfit"
    ERROR = "error"
