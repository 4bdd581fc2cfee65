"""Types of the replies of scripts."""

from __future__ import annotations

from typing import NamedTuple


class StartReply(NamedTuple):
    """Reply of lua/start.lua to one delivery. Neither granted nor refused: another worker has reclaimed it."""

    granted: bool
    """All its locks are taken, if it needs any."""
    token: int = 0
    """Fencing token of its locks."""
    refusing: int | None = None
    """Position of the lock that refused. The task is parked, and none of its locks is held."""
    next_poll_ms: int = 0
    """Time at which the line of that lock is polled (ms since the epoch)."""


class SettleReply(NamedTuple):
    """Reply of lua/settle.lua to one settlement. By default, another worker has reclaimed the delivery."""

    accepted: bool = False
    data_lost: bool = False
    """The server has lost its data since the last renewal: renew, and settle again."""
    refused: str = ""
    """Error of an effect that the server has refused. The others are applied, unless this one must not be lost (a
    retry, a requeue, a dead letter): then the settlement is not accepted.
    """


ACCEPTED = SettleReply(accepted=True)
TAKEN_OVER = SettleReply()
DATA_LOST = SettleReply(data_lost=True)
