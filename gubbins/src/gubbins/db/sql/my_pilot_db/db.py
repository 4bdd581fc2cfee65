"""`MyPilotDB`, the database class of the pilot system. Only `gubbins.logic` uses it."""

from __future__ import annotations

from ..compute_elements import ComputeElementsMixin
from ..identities import IdentitiesMixin
from ..outputs import OutputsMixin
from ..pilots import PilotsMixin
from ..registrations import RegistrationsMixin
from ..statistics import StatisticsMixin
from ..submissions import SubmissionsMixin
from ..transitions import TransitionsMixin


class MyPilotDB(
    ComputeElementsMixin,
    SubmissionsMixin,
    IdentitiesMixin,
    TransitionsMixin,
    PilotsMixin,
    StatisticsMixin,
    OutputsMixin,
    RegistrationsMixin,
):
    """Compute elements, pilots, their history and their output.

    Each method uses the transaction of the caller (`async with db:`), or else a short one of its own, which is
    repeated after a deadlock. `await db.run(work)` combines several calls in such a transaction.
    """
