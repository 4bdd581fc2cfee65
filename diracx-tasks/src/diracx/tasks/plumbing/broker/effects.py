"""Completion effects of a task: its stored result, its group, and the outcome of its schedule."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ..exceptions import ResultTooLargeError
from ..messages.error_info import ErrorInfo
from . import keys
from .labels import LABEL_CHILD_RESULTS, LABEL_GROUP, LABEL_GROUP_RESULTS, LABEL_RESULT_TTL, LABEL_SCHEDULE
from .models import TaskMessage, TaskResult
from .requests import Effects, GroupEffect, ScheduleEffect
from .sizes import MAX_BYTES

#: Characters of a child's error that its group keeps.
_LONGEST_ERROR = 500


def completion_effects(
    message: TaskMessage,
    make: Callable[[], TaskResult[Any]],
    error: ErrorInfo | None,
    seconds: float,
    ttl_seconds: float | None,
    longest: int = MAX_BYTES,
) -> Effects:
    """Effects of the end of a task.

    Args:
        make: makes the result; called only if the result is stored.
        error: None when the task has succeeded.
        seconds: duration of the last execution.
        ttl_seconds: time to live of the result when the task has no label for it; None: it is not stored.
        longest: limit in bytes; a larger result is replaced by an error.
    """
    effects: Effects = {}
    labels = message.labels
    if (ttl := labels.get(LABEL_RESULT_TTL, ttl_seconds)) is not None:
        value = _packed(make(), longest)
        effects["result"] = {
            "key": keys.RESULT_PREFIX + message.task_id,
            "value": value,
            "ttl_ms": int(ttl * 1000),
        }
    if (group := labels.get(LABEL_GROUP)) is not None:
        ended: GroupEffect = {"id": group, "child": message.task_id}
        if error is not None:
            ended["error"] = f"{error['type']}: {error['message']}"[:_LONGEST_ERROR]
        if labels.get(LABEL_GROUP_RESULTS):
            ended["result"] = _packed(make(), longest)
        effects["group"] = ended
    if (request := labels.get(LABEL_CHILD_RESULTS)) is not None:
        effects["release_results"] = request["group"]
    if (outcome := _schedule_effect(message, error, seconds)) is not None:
        effects["outcome"] = outcome
    return effects


def retry_effects(message: TaskMessage, error: ErrorInfo, seconds: float, retry_seconds: float) -> Effects:
    """Effects of an attempt with a retry in `retry_seconds`: the group is kept, the schedule notes the failure."""
    effects: Effects = {}
    if (group := message.labels.get(LABEL_GROUP)) is not None:
        effects["group"] = {"id": group}
    if (outcome := _schedule_effect(message, error, seconds, retry_seconds)) is not None:
        effects["outcome"] = outcome
    return effects


def _schedule_effect(
    message: TaskMessage, error: ErrorInfo | None, seconds: float, retry_seconds: float | None = None
) -> ScheduleEffect | None:
    schedule = message.labels.get(LABEL_SCHEDULE)
    if not isinstance(schedule, str):
        return None
    outcome: dict[str, Any] = {"task_id": message.task_id, "ok": error is None, "seconds": round(seconds, 3)}
    if error is not None:
        outcome |= {"error": error["type"], "message": error["message"][:_LONGEST_ERROR]}
    if retry_seconds is not None:
        outcome["retry_seconds"] = retry_seconds
    return {"id": schedule, "text": json.dumps(outcome)}


def _packed(result: TaskResult[Any], longest: int) -> bytes:
    try:
        data = result.dumpb()
        if len(data) <= longest:
            return data
        raise ResultTooLargeError(
            f"the result has {len(data)} bytes, more than {longest}: it is not kept; return where the data are, "
            "or raise max_result_bytes"
        )
    except BaseException as error:  # encoding the value may run user code, which may raise anything
        # The task has succeeded all the same; the stored error explains the missing value.
        return TaskResult.from_exception(error, result.execution_time).dumpb()
