"""`MyPilotDB`: the one database class of the pilot system. Only `gubbins.logic` uses it."""

from __future__ import annotations

__all__ = ["MyPilotDB"]

from .outputs import OutputStore
from .pilots import PilotStore
from .pruning import PruningStore
from .statistics import CourseStore
from .transitions import TransitionStore


class MyPilotDB(TransitionStore, PilotStore, CourseStore, OutputStore, PruningStore):
    """Compute elements, pilots, their history and their output.

    Every method works inside a transaction of the caller (`async with db:`) and, without one, in a short
    transaction of its own, which is repeated when a deadlock ends it; `await db.run(work)` groups several calls
    into one such transaction.
    """
