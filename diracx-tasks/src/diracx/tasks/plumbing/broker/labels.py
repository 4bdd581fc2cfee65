"""Labels of a message that have a meaning for the task system, and checks of their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..enums import Priority, Size
from .keys import stream_name_for

LABEL_ATTEMPTS = "attempts"
#: Number of retries after a failure, in the format of version 0.7.
LABEL_RETRIES = "_retry_attempt"
#: Id of the callback group, in the format of version 0.7.
LABEL_GROUP = "group_id"
LABEL_GROUP_RESULTS = "group_results"
LABEL_CHILD_RESULTS = "child_results"
#: Positions of secret arguments, to mask them in programs that do not have the task class.
LABEL_SECRET = "secret"  # noqa: S105  # the name of a label
LABEL_RESULT_TTL = "result_ttl_seconds"
#: VO of a task whose class has no argument `vo`, set by the submitter.
LABEL_VO = "vo"
#: Set by the scheduler: the schedule, and the due time of the occurrence (ms since the epoch).
LABEL_SCHEDULE = "schedule"
LABEL_DUE = "schedule_due_ms"

#: Labels with completion effects: the end of the task changes more than the delivery.
COMPLETION_LABELS = frozenset({LABEL_RESULT_TTL, LABEL_GROUP, LABEL_CHILD_RESULTS, LABEL_SCHEDULE})

#: Choose the queue of a message, as in DiracX's own task system, unless the task class does.
LABEL_PRIORITY = "priority"
LABEL_SIZE = "size"

#: Longest time to live: ten years, which every server accepts.
LONGEST_TTL_SECONDS = 315_576_000
_LONGEST_SHOWN = 100
_Check = Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_attempt(value: Any) -> bool:
    texts = ("type", "message", "traceback", "host")
    return isinstance(value, dict) and all(isinstance(value.get(name, ""), str) for name in texts)


def _names_group(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("group"), str) and _is_number(value.get("total"))


def _all(check: _Check) -> _Check:
    return lambda value: isinstance(value, list | tuple) and all(map(check, value))


#: Check of each label's value, and its description.
_CHECKS: Mapping[str, tuple[_Check, str]] = {
    LABEL_ATTEMPTS: (_all(_is_attempt), "a list of failed attempts"),
    LABEL_RETRIES: (_is_number, "a number of retries"),
    LABEL_GROUP: (lambda value: isinstance(value, str), "the id of a group"),
    LABEL_GROUP_RESULTS: (lambda value: isinstance(value, bool | int), "true or false"),
    LABEL_CHILD_RESULTS: (_names_group, "the group and its number of children"),
    LABEL_SECRET: (_all(_is_number), "a list of positions"),
    LABEL_RESULT_TTL: (
        lambda value: value is None or (_is_number(value) and 0 < value <= LONGEST_TTL_SECONDS),
        f"a positive number of seconds up to {LONGEST_TTL_SECONDS} (ten years)",
    ),
    LABEL_SCHEDULE: (lambda value: isinstance(value, str), "the name of a schedule"),
    LABEL_DUE: (_is_number, "a time in ms since the epoch"),
}
#: Labels whose values are checked.
CHECKED_LABELS = frozenset(_CHECKS)


def checked_labels(labels: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a copy of the labels for a submission.

    Raises:
        ValueError: when a label with a meaning for the task system has an invalid value.
    """
    checked = dict(labels or {})
    if LABEL_ATTEMPTS in checked:
        raise ValueError(f"the label {LABEL_ATTEMPTS} is the task system's own")
    check_labels(checked)
    stream_of_labels(checked)
    return checked


def stream_of_labels(
    labels: Mapping[str, Any], priority: Priority | str | None = None, size: Size | str | None = None
) -> str:
    """Stream for a message: `priority` and `size`, else the labels of these names, else normal and medium.

    Raises:
        ValueError: names the label, its value and the possible values.
    """
    return stream_name_for(
        priority or _routing(labels, LABEL_PRIORITY, Priority.NORMAL),
        size or _routing(labels, LABEL_SIZE, Size.MEDIUM),
    )


def _routing(labels: Mapping[str, Any], name: str, default: Priority | Size) -> str:
    value = labels.get(name, default)
    if value is default:  # nearly always
        return str(value)
    possible = [str(each) for each in type(default)]
    if value not in possible:
        raise ValueError(f"the label {name} must be {', '.join(possible)}, not {_shown(value)}")
    return str(value)


def check_labels(labels: Mapping[str, Any]) -> None:
    """Check the labels of a message of any origin.

    Raises:
        ValueError: names the label, its value and the possible values.
    """
    for name in CHECKED_LABELS.intersection(labels):
        is_valid, expected = _CHECKS[name]
        if not is_valid(labels[name]):
            raise ValueError(f"the label {name} must be {expected}, not {_shown(labels[name])}")


def _shown(value: Any) -> str:
    try:
        shown = repr(value)
    except Exception:  # a number of more than 4,300 digits, say
        shown = f"a {type(value).__name__}"
    return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}…"
