"""Requests of a worker to start a delivery, for tests that take the steps of the broker one by one."""

from __future__ import annotations

__all__ = ["start_request"]

from collections.abc import Iterable
from typing import Any

from diracx.tasks.plumbing.broker.models import Delivery, TaskMessage
from diracx.tasks.plumbing.broker.requests import LockSpec
from diracx.tasks.plumbing.broker.streams import resumed_stream
from diracx.tasks.plumbing.enums import Priority
from diracx.tasks.plumbing.locks import BaseLock


def start_request(delivery: Delivery, locks: Iterable[BaseLock | LockSpec], retry_ms: int = 1000) -> Any:
    """The request to start the task of a delivery with these locks, or to park it for so long at most."""
    assert delivery.data is not None
    return {
        "stream": delivery.stream,
        "entry": delivery.entry,
        "deliveries": delivery.deliveries,
        "task": TaskMessage.loadb(delivery.data).task_id,
        "rank": list(Priority).index(delivery.priority),
        "resumed": resumed_stream(delivery.stream),
        "since": delivery.since,
        "locks": [lock.spec() if isinstance(lock, BaseLock) else lock for lock in locks],
        "retry_ms": retry_ms,
        "granted": delivery.granted,
    }
