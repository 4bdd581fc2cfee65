"""Arguments of the scripts. The headers of `lua/*.lua` say what each field means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NotRequired, Required, TypedDict


class LockNumbers(TypedDict, total=False):
    ttl_ms: int
    limit: int
    window_us: int
    n_items: int


class LockSpec(LockNumbers):
    kind: str
    key: str
    owner: str


class Entry(TypedDict):
    stream: str
    entry: str
    deliveries: int


class StartRequest(Entry):
    task: str
    rank: int
    resumed: str
    since: str
    locks: Sequence[LockSpec]
    retry_ms: int
    granted: NotRequired[bytes]


class DelayedRetry(TypedDict):
    task: str
    delay_ms: int
    stream: str
    data: bytes
    occurrence: NotRequired[str]


class Requeue(TypedDict):
    stream: str
    data: bytes | None
    since: str


class ResultEffect(TypedDict):
    key: str
    value: bytes
    ttl_ms: int


class GroupEffect(TypedDict):
    """A child of a group has ended; without `child`, the group is kept."""

    id: str
    child: NotRequired[str | bytes]
    error: NotRequired[str]
    result: NotRequired[bytes]


class ScheduleEffect(TypedDict):
    id: str
    text: str


class Effects(TypedDict, total=False):
    result: ResultEffect
    group: GroupEffect
    release_results: str
    outcome: ScheduleEffect


class StoredDeadLetter(TypedDict):
    reason: str
    data: bytes


class CancelRequest(Effects, total=False):
    """A task that is to be cancelled, and where it is believed to be."""

    task: Required[str]
    marked: int
    known: int
    waiting: int
    stream: str
    entry: str


class Occurrence(TypedDict):
    """A run of a schedule that is due (ms since 1970); without a stream, it is passed over."""

    id: str
    due: int
    next: NotRequired[int]
    stream: NotRequired[str]
    task: NotRequired[str]
    data: NotRequired[bytes]


class PlanStep(TypedDict):
    """A schedule that is new, changed (`fingerprint`), switched off, or forgotten (1)."""

    id: str | bytes
    fingerprint: NotRequired[str]
    due: NotRequired[int]
    forgotten: NotRequired[int]


class GroupChild(TypedDict):
    task: str
    staged: bytes


class Resubmission(TypedDict):
    ticket: str
    stream: str
    data: bytes


#: What a group is made with: its callbacks, their streams, and numbers.
GroupFields = dict[str, Any]
