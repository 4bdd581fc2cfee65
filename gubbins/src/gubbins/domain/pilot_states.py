"""States of a pilot: SUBMITTED → RUNNING → DONE or FAILED (seed `000`)."""

from __future__ import annotations

from enum import StrEnum


class MyPilotStatus(StrEnum):
    """State of a pilot."""

    SUBMITTED = "SUBMITTED"
    RUNNING = "RUNNING"
    DONE = "DONE"
    FAILED = "FAILED"


ACTIVE = (MyPilotStatus.SUBMITTED, MyPilotStatus.RUNNING)
"""The states in which a pilot holds a slot of its compute element."""

PREDECESSOR = {
    MyPilotStatus.RUNNING: MyPilotStatus.SUBMITTED,
    MyPilotStatus.DONE: MyPilotStatus.RUNNING,
    MyPilotStatus.FAILED: MyPilotStatus.RUNNING,
}
"""The three arrows of the state machine, read backwards: each state is entered from exactly one other.

That makes every transition a compare-and-set with a constant on its right-hand side.
"""

CANCELLED_FOR = "cancelled, for "
"""Beginning of the last error of pilots that a rule cancels, which is also the reason of their end."""


class PilotOutcome(StrEnum):
    """Outcome that a pilot reports of itself; its state at the end is what its compute element says."""

    WORKED = "worked"
    NO_WORK = "no work"
    NODE_UNFIT = "node unfit"
    ERROR = "error"
