"""Links: network connections between a process and its server that can be held, delayed and cut."""

from __future__ import annotations

import time

from support.network import DIRECTIONS, Network

from .plan import Disturbance
from .processes import History


class Link:
    """A proxy of its own for one process, and a record of when it let nothing through in time."""

    def __init__(self, name: str, server_url: str, history: History) -> None:
        self.name = name
        self._network = Network(server_url)
        self._history = history
        self._disturbed_at: float | None = None
        self._end_at = 0.0
        self._network.start()

    @property
    def url(self) -> str:
        return self._network.url

    @property
    def disturbed(self) -> bool:
        return self._disturbed_at is not None

    def strike(self, disturbance: Disturbance) -> None:
        """Begin the failure; `look` ends it when its time is over."""
        what = disturbance.what
        if what.startswith("cut"):
            # Replies are short: within the first bytes of one, so that its end is missing.
            self._network.cut(1 + disturbance.which % 40 if what.endswith("reply") else None)
        elif what.startswith("half-close"):
            self._network.half_close(DIRECTIONS[disturbance.which % 2])
        else:
            self._disturbed_at = time.monotonic()
            self._end_at = self._disturbed_at + disturbance.seconds
            if what.startswith("delay"):
                self._network.delay_seconds = disturbance.delay_seconds
            else:
                one_way = what.rpartition(" ")[2]
                self._network.hold(*(direction for direction in DIRECTIONS if direction == one_way))

    def look(self, *, end: bool = False) -> None:
        """End the disturbance if it is time, or at once."""
        if self._disturbed_at is None or not (end or time.monotonic() >= self._end_at):
            return
        # What was delayed last arrives by so much later.
        over = time.monotonic() + self._network.delay_seconds
        self._network.delay_seconds = 0.0
        self._network.release()
        self._history.disconnected.setdefault(self.name, []).append((self._disturbed_at, over))
        self._disturbed_at = None

    def lead_to(self, server_url: str) -> None:
        self._network.lead_to(server_url)

    def stop(self) -> None:
        self._network.stop()
