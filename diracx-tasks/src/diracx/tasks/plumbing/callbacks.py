"""Callback groups: a callback task is submitted when all children have ended.

A group is a set of child ids, so that a child that is delivered twice counts once. The script that settles the
last child submits the callback, exactly once. A child ends when it has succeeded or failed permanently, not when
it is retried or waits for a lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from .base_task import BaseTask, Submitter, current_broker, current_message, current_submitter
from .broker.groups import fire, read_results
from .broker.labels import LABEL_CHILD_RESULTS, LABEL_GROUP, LABEL_GROUP_RESULTS
from .broker.models import TaskResult
from .broker.telemetry import submission_spans
from .submission.client import bound_from_environment

if TYPE_CHECKING:
    from redis.asyncio import Redis

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

    A callback (or `on_failure`) with a parameter `ChildResults` gets the return values of the children.

    Args:
        redis: ignored; for compatibility with the published interface.
        ttl_seconds: how long a failed group is kept. A group with pending children is kept for at least 7 days
            after the last activity of a child.
        on_failure: submitted instead of the callback if a child has failed permanently, when all have ended.
            Without it the group is kept for `ttl_seconds`, marked as failed.

    Returns:
        The group id. The callback of a group without children is submitted immediately.

    Raises:
        RuntimeError: no broker is bound.
        SendTaskError: the broker cannot be reached. Nothing was submitted, unless only the last reply was lost.
        TypeError: an argument of one of the tasks would not arrive equal; nothing was submitted.
        TaskTooLargeError: the message of one of the tasks is too large; nothing was submitted.
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
    """Return the fields of a task that a script submits later: message, name, stream and options."""
    with_results = _needs_results(type(task))
    labels = {LABEL_CHILD_RESULTS: {"group": group_id, "total": total}} if with_results else {}
    submission = submitter.submission(task, labels=labels)
    with submission_spans([submission]):
        stored: dict[str, Any] = {
            role: submission.dumpb(),
            f"{role}_name": submission.message.task_name,
            f"{role}_stream": submission.stream,
        }
    return stored | ({f"{role}_results": 1} if with_results else {})


async def child_results() -> dict[str, TaskResult[Any]]:
    """Return the results of the children of the group whose callback is executed.

    Raises:
        RuntimeError: the task is not the callback of a group.
        ResultIsMissingError: they have expired.
    """
    message = current_message.get()
    group = None if message is None else message.labels.get(LABEL_CHILD_RESULTS)
    if group is None:
        raise RuntimeError(
            "ChildResults are available only in the callback of a group: submit the task with spawn_with_callback"
        )
    return await read_results(current_broker().redis, group["group"], group["total"])


def _needs_results(task_class: type[BaseTask]) -> bool:
    """Return whether `execute` (or a dependency of it) takes `ChildResults`."""
    from .injection.placeholders import calls_below
    from .injection.plan import compile_plan

    return child_results in calls_below(compile_plan(task_class.execute, skip_first=True), {})


async def fire_callback(redis: Redis, group_id: str, broker: RedisStreamBroker | None = None) -> bool:
    """Submit the callback of a group now, or `on_failure` if a child has failed. Later calls have no effect."""
    return await fire(redis if broker is None else broker.redis, group_id)


class SpawnCallback:
    """Dependency that spawns a group of tasks with a callback."""

    async def __call__(
        self,
        children: list[BaseTask],
        callback: BaseTask,
        *,
        ttl_seconds: int = DAY_SECONDS,
        on_failure: BaseTask | None = None,
    ) -> str:
        """Submit a group as `spawn_with_callback` does, and return its id.

        Uses the bound broker, else that of ``DIRACX_TASKS_REDIS_URL``.
        """
        with bound_from_environment():
            return await spawn_with_callback(children, callback, ttl_seconds=ttl_seconds, on_failure=on_failure)


def callback_spawner() -> SpawnCallback:
    """Provide the spawner, which looks up its broker when it is called, in the body of a route."""
    return SpawnCallback()
