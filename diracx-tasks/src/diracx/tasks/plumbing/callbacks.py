"""Callback groups: a callback task is submitted when all children have ended.

The group is a set of child ids, so a child that is delivered twice is subtracted once, and the callback is
submitted by the same script that settles the last child: exactly once, whatever dies in between. A child ends
when it has succeeded, or failed permanently: a retry, or waiting for a lock, is no end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from .base_task import Submitter, current_submitter
from .broker.groups import GroupStatus, fire, list_groups, read_group
from .broker.labels import LABEL_CHILD_RESULTS, LABEL_GROUP, LABEL_GROUP_RESULTS
from .broker.spans import submission_spans
from .child_results import asks_for_results
from .submission.client import bound_from_environment

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from .base_task import BaseTask
    from .broker import RedisStreamBroker

__all__ = ["GroupStatus", "fire_callback", "list_groups", "read_group", "spawn_with_callback"]

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

    A callback (or `on_failure`) that takes `ChildResults` gets what the children returned.

    Args:
        redis: kept for callers of the published interface; the broker of the context is used.
        ttl_seconds: how long a failed group is kept to be seen. One whose children have not all ended
            lives on, for at least 7 days after the last sign of life of a child.
        on_failure: submitted instead of the callback when all children have ended and one of them has
            failed permanently. Without it the group stays, marked as failed, for `ttl_seconds`.

    Returns:
        The group's id. A group without children fires its callback at once.

    Raises:
        RuntimeError: when no broker is bound here.
        SendTaskError: when the broker cannot be reached. Nothing was submitted then, unless it was only the
            last answer that got lost.
        TypeError: when an argument of one of the tasks cannot travel; nothing was submitted.
        TaskTooLargeError: when the message of one of them is too large; nothing was submitted.
    """
    if ttl_seconds <= 0:
        raise ValueError(f"ttl_seconds must be positive, not {ttl_seconds!r}")
    submitter = await current_submitter()
    group_id = uuid4().hex
    children = list(children)
    total = len(children)
    fields: dict[str, Any] = {"total": total, **_stored(submitter, "callback", callback, group_id, total)}
    if on_failure is not None:
        fields |= _stored(submitter, "failure", on_failure, group_id, total)
    labels: dict[str, Any] = {LABEL_GROUP: group_id}
    if "callback_results" in fields or "failure_results" in fields:
        fields["results"] = 1
        labels[LABEL_GROUP_RESULTS] = True
    submissions = [submitter.submission(child, labels=labels) for child in children]
    await submitter.broker.submit_group(group_id, submissions, fields, ttl_seconds)
    return group_id


def _stored(submitter: Submitter, role: str, task: BaseTask, group_id: str, total: int) -> dict[str, Any]:
    """Task that a script submits later: its message, stream and options."""
    asks = asks_for_results(type(task))
    labels = {LABEL_CHILD_RESULTS: {"group": group_id, "total": total}} if asks else {}
    submission = submitter.submission(task, labels=labels)
    with submission_spans([submission]):
        stored: dict[str, Any] = {
            role: submission.dumpb(),
            f"{role}_name": submission.message.task_name,
            f"{role}_stream": submission.stream,
        }
    return stored | ({f"{role}_results": 1} if asks else {})


async def fire_callback(redis: Redis, group_id: str, broker: RedisStreamBroker | None = None) -> bool:
    """Submit a group's callback now, without waiting for its children. Only the first call has an effect.

    When a child has failed it is `on_failure` that is submitted, if there is one.
    """
    return await fire(redis if broker is None else broker.redis, group_id)


class SpawnCallback:
    """Spawns a group of tasks whose callback runs when the last of them is done."""

    async def __call__(
        self,
        children: list[BaseTask],
        callback: BaseTask,
        *,
        ttl_seconds: int = DAY_SECONDS,
        on_failure: BaseTask | None = None,
    ) -> str:
        """Submit `children`, and `callback` after all of them have succeeded; return the group's id.

        `ttl_seconds` is how long the group is remembered, `on_failure` what is submitted in place of the
        callback when a child finally failed. The broker is the one bound where the call is made;
        where none is bound, it is made from ``DIRACX_TASKS_REDIS_URL``.
        """
        with bound_from_environment():
            return await spawn_with_callback(children, callback, ttl_seconds=ttl_seconds, on_failure=on_failure)


def callback_spawner() -> SpawnCallback:
    """Provide the spawner.

    It looks for its broker when it is called, not here: FastAPI resolves dependencies before the body of a
    route runs, and only the body has a broker bound.
    """
    return SpawnCallback()
