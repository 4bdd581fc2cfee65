"""Types of the arguments of scripts. The headers of `lua/*.lua` explain each field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, NotRequired, Required, TypedDict

LockKind = Literal["mutex", "exclusive", "shared", "concurrency", "rate"]


class KindOfLock(NamedTuple):
    """Properties of a kind of lock. Its functions, and what only scripts have to know, are in lua/_kinds.lua."""

    prefix: str
    """Beginning of the Redis keys, before the first colon of the name."""
    is_limiter: bool = False
    """Has a limit, which the configuration may set."""
    is_quota: bool = False
    """Has no holders: what was taken is never given back."""
    includes: str = ""
    """Kind that a task does not need in addition, on the same key."""


#: By name, which has no colon and no space.
LOCK_KINDS: dict[str, KindOfLock] = {
    "mutex": KindOfLock("lock:mutex"),
    "exclusive": KindOfLock("lock:rw", includes="shared"),
    "shared": KindOfLock("lock:rw"),
    "concurrency": KindOfLock("limiter:conc", is_limiter=True),
    "rate": KindOfLock("limiter:rate", is_limiter=True, is_quota=True),
}


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
    data: bytes | None
    redeliveries: int
    occurrence: str | None


class Requeue(TypedDict):
    stream: str
    data: bytes | None
    since: str


class ResultEffect(TypedDict):
    key: str
    value: bytes
    ttl_ms: int


class GroupEffect(TypedDict):
    """End of a child of a group; without `child`, only the group's expiry is extended."""

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
    """A task to cancel, and its supposed position."""

    task: Required[str]
    marked: int
    known: int
    waiting: int
    stream: str
    entry: str


class Occurrence(TypedDict):
    """A due run of a schedule (times in ms since 1970); without a stream, it is skipped."""

    id: str
    due: int
    next: NotRequired[int]
    stream: NotRequired[str]
    task: NotRequired[str]
    data: NotRequired[bytes]


class PlanStep(TypedDict):
    """A schedule that is new, changed (`fingerprint`), disabled, or deleted (`forgotten` is 1)."""

    id: str | bytes
    fingerprint: NotRequired[str]
    due: NotRequired[int]
    forgotten: NotRequired[int]


class GroupChild(TypedDict):
    task: str
    staged: bytes


#: How long the server records that a dead letter was submitted again: within this time, an interrupted attempt may
#: be repeated.
RESUBMITTED_TTL_SECONDS = 30 * 86400


class Resubmission(TypedDict):
    ticket: str
    stream: str
    data: bytes


#: Fields of a new group: its callbacks, their streams, and numbers.
GroupFields = dict[str, Any]
