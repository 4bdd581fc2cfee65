"""What the end of a task means to others: to whoever waits for its result, to its group, to its schedule."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ..exceptions import ResultTooLargeError
from ..messages.error_info import ErrorInfo
from . import keys
from .labels import LABEL_CHILD_RESULTS, LABEL_GROUP, LABEL_GROUP_RESULTS, LABEL_RESULT_TTL, LABEL_SCHEDULE
from .models import TaskMessage, TaskResult
from .sizes import MAX_BYTES

#: What a group shows of a child's error.
_LONGEST_ERROR = 500


def result_effect(
    message: TaskMessage,
    ttl_seconds: float | None,
    make: Callable[[], TaskResult[Any]],
    longest: int = MAX_BYTES,
) -> dict[str, Any] | None:
    """The result as scripts store it; None when nobody wants it.

    Args:
        ttl_seconds: how long it is kept where the task's own label says nothing; None: not at all.
        longest: bytes; of what is larger, only that is kept that it was.
    """
    ttl_seconds = message.labels.get(LABEL_RESULT_TTL, ttl_seconds)
    if ttl_seconds is None:
        return None
    ttl_ms = int(ttl_seconds * 1000)
    return {"key": keys.RESULT_PREFIX + message.task_id, "value": _packed(make(), longest), "ttl_ms": ttl_ms}


def group_effect(
    message: TaskMessage,
    error: ErrorInfo | None,
    make: Callable[[], TaskResult[Any]],
    longest: int = MAX_BYTES,
) -> dict[str, Any] | None:
    """What its group is told of a child that has ended for good; None when it is in no group.

    Args:
        longest: as for `result_effect`.
    """
    group = message.labels.get(LABEL_GROUP)
    if group is None:
        return None
    told: dict[str, Any] = {"id": group, "child": message.task_id}
    if error is not None:
        told["error"] = f"{error['type']}: {error['message']}"[:_LONGEST_ERROR]
    if message.labels.get(LABEL_GROUP_RESULTS):
        told["result"] = _packed(make(), longest)
    return told


def touch_group(message: TaskMessage) -> dict[str, Any] | None:
    """What its group is told of a child that will be tried again."""
    group = message.labels.get(LABEL_GROUP)
    return None if group is None else {"id": group}


def release_results(message: TaskMessage) -> str | None:
    """The group whose results were kept for this task, a callback."""
    asked = message.labels.get(LABEL_CHILD_RESULTS)
    return None if asked is None else asked["group"]


def schedule_outcome(
    message: TaskMessage, error: ErrorInfo | None, seconds: float, retry_seconds: float | None = None
) -> dict[str, Any] | None:
    """What is kept of how an occurrence of a schedule ended; None for any other task.

    Args:
        seconds: how long the last execution took.
        retry_seconds: after how long it is tried again; None when it has ended for good.
    """
    schedule = message.labels.get(LABEL_SCHEDULE)
    if not isinstance(schedule, str):
        return None
    told: dict[str, Any] = {"task_id": message.task_id, "ok": error is None, "seconds": round(seconds, 3)}
    if error is not None:
        told |= {"error": error["type"], "message": error["message"][:_LONGEST_ERROR]}
    if retry_seconds is not None:
        told["retry_seconds"] = retry_seconds
    return {"id": schedule, "text": json.dumps(told)}


def _packed(result: TaskResult[Any], longest: int) -> bytes:
    try:
        data = result.dumpb()
        if len(data) <= longest:
            return data
        raise ResultTooLargeError(
            f"the result has {len(data)} bytes, more than {longest}: it is not kept; return where the data are, "
            "or raise max_result_bytes"
        )
    except BaseException as error:  # a property of the value's own may raise anything
        # The work is done and stays done; whoever waits learns why there is no value.
        return TaskResult.from_exception(error, result.execution_time).dumpb()
