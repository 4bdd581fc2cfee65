"""What an operator can do beside looking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .models import Released

if TYPE_CHECKING:
    from redis.asyncio import Redis


async def purge(redis: Redis, queue: str) -> int:
    """Remove all tasks that wait in a queue (`{priority}:{size}`); what runs goes on. Returns how many.

    Raises:
        ValueError: when there is no such queue.
    """
    raise NotImplementedError


async def release_lock(redis: Redis, key: str, owners: Sequence[str] | None = None) -> Released:
    """Take a lock away from those who hold it, and wake who waits for it. Spent quota of a rate limiter comes back.

    Args:
        owners: only from these, as somebody saw them (`Holder.owner`); None: from all who hold it now.

    Raises:
        ValueError: when the key is not that of a lock.
    """
    raise NotImplementedError
