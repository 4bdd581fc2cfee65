"""Leased deliveries of a worker, for an intake without a worker."""

from __future__ import annotations

from collections.abc import Collection

from diracx.tasks.plumbing.broker.models import Delivery
from diracx.tasks.plumbing.broker.requests import LockSpec


class LeasedDeliveries(list[Delivery]):
    """A list of deliveries, none of which has locks."""

    quiet_until = 0.0

    def held(self) -> Collection[tuple[str, str]]:
        return [(delivery.stream, delivery.entry) for delivery in self]

    def held_locks(self) -> Collection[LockSpec] | None:
        return None
