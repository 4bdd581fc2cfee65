"""Memory of the server: how much it uses, and whether it throws data away when it is full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from redis.asyncio import Redis

#: The only policy that keeps what it was given; with any other the server deletes tasks and locks to make room.
SAFE_POLICY = "noeviction"


@dataclass(frozen=True, slots=True)
class ServerMemory:
    """What the server says of its memory. None where its user may not ask."""

    used_bytes: int | None = None
    limit_bytes: int | None = None
    """None also where no limit is set."""
    policy: str | None = None
    """`maxmemory-policy`."""


async def read_memory(redis: Redis) -> ServerMemory:
    """Ask with INFO, which managed servers allow where CONFIG is forbidden.

    Raises:
        redis.exceptions.RedisError: when the server does not answer.
    """
    from redis.exceptions import NoPermissionError

    try:
        found = await redis.info("memory")
    except NoPermissionError:
        return ServerMemory()
    return ServerMemory(found.get("used_memory"), found.get("maxmemory") or None, found.get("maxmemory_policy"))


def eviction_problem(policy: str | None, limit_bytes: int | None) -> str | None:
    """What is wrong with the server's `maxmemory-policy`; None when nothing is known to be.

    Args:
        policy: None: unknown.
        limit_bytes: None: no limit is set.
    """
    if policy is None or policy == SAFE_POLICY:
        return None
    when = "as soon as a maxmemory is set" if limit_bytes is None else "when its memory is full"
    return f"Redis has maxmemory-policy {policy}: it deletes tasks and locks {when}, and says nothing"
