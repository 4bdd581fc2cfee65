"""Callback groups: when all children have ended, one more task starts.

The group is a set of child ids, so a child that is delivered twice is subtracted once, and the callback is
submitted by the same script that settles the last child: exactly once, whatever dies in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from .binding import Binding, current_binding
from .broker import scripts
from .broker.models import LABEL_GROUP

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from .base_task import BaseTask
    from .broker import RedisStreamBroker

DAY_SECONDS = 86_400


async def spawn_with_callback(
    children: Sequence[BaseTask],
    callback: BaseTask,
    *,
    redis: Redis | RedisStreamBroker | None = None,
    ttl_seconds: int = DAY_SECONDS,
    on_failure: BaseTask | None = None,
) -> str:
    """Submit the children, and the callback when all of them have succeeded.

    Args:
        redis: kept for callers of the published interface; the broker of the context is used.
        ttl_seconds: how long the group is remembered after its last sign of life.
        on_failure: submitted instead of the callback when a child finally failed. Without it the group
            stays, marked as failed, until its time to live ends.

    Returns:
        The group's id. A group without children fires its callback at once.

    Raises:
        RuntimeError: when no broker is bound here.
        SendTaskError: when the broker cannot be reached; nothing was submitted then.
    """
    if ttl_seconds <= 0:
        raise ValueError(f"ttl_seconds must be positive, not {ttl_seconds!r}")
    binding = current_binding()
    group_id = uuid4().hex
    submissions = [binding.submission(child, labels={LABEL_GROUP: group_id}) for child in children]
    fields: dict[str, Any] = {"total": len(submissions), **_stored(binding, "callback", callback)}
    if on_failure is not None:
        fields |= _stored(binding, "failure", on_failure)
    await binding.broker.submit_group(group_id, submissions, fields, ttl_seconds)
    return group_id


def _stored(binding: Binding, field: str, task: BaseTask) -> dict[str, Any]:
    submission = binding.submission(task)
    return {f"{field}_stream": submission.stream, field: submission.message.dumpb()}


async def fire_callback(redis: Redis, group_id: str, broker: RedisStreamBroker | None = None) -> bool:
    """Submit a group's callback now, without waiting for its children. Only the first call does anything."""
    return await scripts.fire(redis if broker is None else broker.redis, group_id)
