"""Models of the broker: message of a task, its result, its delivery to a worker, and the settlement."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, Protocol, Self, TypeVar

import msgpack

from ..enums import Priority, Size
from ..exceptions import NewerMessageError, ResultIsMissingError
from ..messages.codec import dumps, loads
from ..messages.error_info import ErrorInfo, cut, describe_exception
from .labels import CHECKED_LABELS, LABEL_ATTEMPTS, check_labels, checked_labels, stream_of_labels
from .replies import SettleReply
from .requests import (
    DelayedRetry,
    GroupEffect,
    LockSpec,
    Requeue,
    ResultEffect,
    ScheduleEffect,
    StoredDeadLetter,
)
from .sizes import LOCK_BYTES, SMALL_BYTES, checked_size
from .stored import number_of, text_of

_Value = TypeVar("_Value")

_SEQUENCE = (list, tuple)
_LONGEST_REASON = 300
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

#: Format of messages. A message that older versions cannot decode or execute has a greater number in its field
#: `format`, and is still a msgpack map that begins with the task's id.
FORMAT = 1


def new_task_id() -> str:
    """Make a task id: 32 hexadecimal digits."""
    return os.urandom(16).hex()


def in_ms(moment: datetime) -> int:
    """Milliseconds since the epoch, rounded up. A naive datetime is taken as UTC."""
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return -((_EPOCH - moment) // timedelta(milliseconds=1))


@dataclass(kw_only=True, slots=True)
class TaskMessage:
    """Message of a task. Its id stays the same through retries and redeliveries."""

    task_id: str
    task_name: str
    """Registry name, `{category}:{ClassName}`."""
    labels: dict[str, Any] = field(default_factory=dict)
    task_args: list[Any] = field(default_factory=list)
    task_kwargs: dict[str, Any] = field(default_factory=dict)
    trace_context: dict[str, str] = field(default_factory=dict)
    """W3C trace headers of the submitter."""
    sig: int = 0
    """Hash of the field names of the values in `task_args`; 0: unknown. Other implementations ignore it."""
    later_fields: dict[str, Any] | None = field(default=None, init=False)
    """Fields that a later version has added: kept when the message is stored again."""

    def dumpb(self) -> bytes:
        """Encode the message, with all fields that version 0.7 needs.

        Raises:
            TypeError: when an argument or a label has a type that cannot be encoded.
        """
        fields: dict[str, Any] = {"task_id": self.task_id, "task_name": self.task_name}  # the id must be the first
        fields["labels"] = self.labels
        if self.sig:  # before the arguments, so that a reader of a truncated message has it
            fields["sig"] = self.sig
        fields["task_args"] = self.task_args
        fields["task_kwargs"] = self.task_kwargs
        fields["trace_context"] = self.trace_context
        if self.later_fields:
            fields |= self.later_fields
        return dumps(fields)

    @classmethod
    def loadb(cls, data: bytes, *, careful: bool = False) -> Self:
        """Decode a message.

        Args:
            careful: see `codec.loads`.

        Raises:
            NewerMessageError: when it is for a later version; a ValueError.
            ValueError: when the bytes are no task message.
        """
        try:
            try:
                fields = loads(data, careful=careful)
            except ValueError:
                if not careful:
                    _refuse_newer(_format_of(data))  # it may have values of a type that a later version has added
                raise
            if "format" in fields:
                _refuse_newer(fields["format"])
            try:
                message = cls(**fields)
            except TypeError:  # fields of a later version are kept
                later = {name: fields.pop(name) for name in list(fields) if name not in _FIELDS}
                message = cls(**fields)
                message.later_fields = later
        except NewerMessageError:
            raise
        except Exception as error:
            raise ValueError(f"not a task message: {cut(str(error), _LONGEST_REASON)}") from error
        if not (
            isinstance(message.task_id, str)
            and isinstance(message.task_name, str)
            and isinstance(message.labels, dict)
            and isinstance(message.task_args, _SEQUENCE)
            and isinstance(message.task_kwargs, dict)
            and isinstance(message.trace_context, dict)
        ):
            raise ValueError("not a task message: a field has the wrong type")
        if not (message.task_id.isascii() and message.task_name.isascii()):
            try:
                f"{message.task_id}{message.task_name}".encode()
            except UnicodeEncodeError as error:
                raise ValueError("not a task message: its id or name is no text") from error
        context = message.trace_context
        if context and not all(isinstance(text, str) for pair in context.items() for text in pair):
            raise ValueError("not a task message: its trace context is no text")
        if not CHECKED_LABELS.isdisjoint(message.labels):
            try:
                check_labels(message.labels)
            except ValueError as error:
                raise ValueError(f"not a task message: {error}") from error
        return message

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """Failed attempts so far, oldest first: type, message, traceback, host, started, ended."""
        found: list[dict[str, Any]] = self.labels.get(LABEL_ATTEMPTS, [])
        return found


def _refuse_newer(number: Any) -> None:
    if type(number) is int and number > FORMAT:
        raise NewerMessageError(f"its format is {number}, and this version knows up to {FORMAT}")


def _format_of(data: bytes) -> Any:
    """Field `format` of a complete message, without decoding other values; None if it is missing."""
    unpacker, number = msgpack.Unpacker(strict_map_key=False), None
    unpacker.feed(data)
    try:
        for _ in range(unpacker.read_map_header()):
            if unpacker.unpack() == "format":
                number = unpacker.unpack()
            else:
                unpacker.skip()
    except Exception:  # msgpack's errors have no common base class
        return None
    return number if unpacker.tell() == len(data) else None


_FIELDS = frozenset(name for name, each in TaskMessage.__dataclass_fields__.items() if each.init)
_HEAD = b"\xa7task_id"
_FIXED_TEXT, _TEXT_8 = range(0xA0, 0xC0), 0xD9


def id_at_head(data: bytes) -> bytes | None:
    """Task id of a message that may be unreadable otherwise; None when the id is not at its usual position.

    `task_of` in lua/_cancel.lua does the same.
    """
    if data[1:9] != _HEAD or len(data) < 11:
        return None
    if data[9] in _FIXED_TEXT:
        return data[10 : 10 + data[9] - 0xA0]
    return data[11 : 11 + data[10]] if data[9] == _TEXT_8 else None


@dataclass(kw_only=True, slots=True)
class TaskResult(Generic[_Value]):
    """Stored result of a task."""

    is_err: bool
    return_value: _Value
    execution_time: float
    """Duration of the last execution (s)."""
    error: dict[str, str] | None = None
    """`type`, `message` and `traceback` of the exception, when it failed."""
    labels: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_value(
        cls, value: Any, execution_time: float, labels: dict[str, Any] | None = None
    ) -> TaskResult[Any]:
        """Result of a task that succeeded."""
        return TaskResult(is_err=False, return_value=value, execution_time=execution_time, labels=labels or {})

    @classmethod
    def from_exception(
        cls, exc: BaseException, execution_time: float, labels: dict[str, Any] | None = None
    ) -> TaskResult[None]:
        """Result of a task that failed permanently."""
        return cls.from_error(describe_exception(exc), execution_time, labels)

    @classmethod
    def from_error(
        cls, error: ErrorInfo, execution_time: float, labels: dict[str, Any] | None = None
    ) -> TaskResult[None]:
        """Result of a task that failed permanently, from a formatted exception."""
        return TaskResult(
            is_err=True, return_value=None, execution_time=execution_time, error=error, labels=labels or {}
        )

    def raise_for_error(self) -> Self:
        """Return the result, or raise when the task failed.

        Raises:
            RuntimeError: with the type and message of the task's exception.
        """
        if self.is_err:
            error = self.error or {}
            raise RuntimeError(f"[{error.get('type', 'Exception')}] {error.get('message', '')}")
        return self

    def dumpb(self) -> bytes:
        """Encode the result."""
        return dumps(
            {
                "is_err": self.is_err,
                "return_value": self.return_value,
                "execution_time": self.execution_time,
                "error": self.error,
                "labels": self.labels,
            }
        )

    @classmethod
    def loadb(cls, data: bytes | None) -> TaskResult[Any]:
        """Decode a stored result.

        Raises:
            ResultIsMissingError: when `data` is None.
            ValueError: when the bytes are no result.
        """
        if data is None:
            raise ResultIsMissingError("no result is stored under this id (not kept, not ready, or expired)")
        try:
            result = TaskResult(**loads(data))
        except TypeError as error:  # other fields, or none
            raise ValueError("the stored result cannot be decoded: its fields are those of no result") from error
        except ValueError as error:
            raise ValueError(f"the stored result cannot be decoded: {error}") from error
        if not (isinstance(result.execution_time, int | float) and isinstance(result.error, dict | None)):
            raise ValueError("the stored result cannot be decoded: a field has the wrong type")
        return result


@dataclass(frozen=True, slots=True)
class Submission:
    """A message and the stream of its queue."""

    message: TaskMessage
    stream: str
    at_time: datetime | None = None
    """Earliest start; None: now."""

    def dumpb(self) -> bytes:
        """Encode the message and check its size.

        Raises:
            TypeError: when an argument or a label has a type that cannot be encoded.
            TaskTooLargeError: when it is too large.
        """
        data = self.message.dumpb()
        return data if len(data) <= SMALL_BYTES else checked_size(data, self.message.task_name)


@dataclass(slots=True)  # frozen would take longer than the rest of its construction
class Delivery:
    """A message reserved for one worker, which alone may settle it while it is the entry's owner."""

    stream: str
    entry: str
    """Id of the stream entry."""
    deliveries: int
    """Number of deliveries of the entry, including this one: more than one means that a worker was lost."""
    data: bytes | None
    """Encoded message; None when the entry has none."""
    raw: bytes
    """All fields of the entry, for the dead letter of an unreadable message."""
    since: str = "0"
    """Time when the task was first parked for a lock (µs since the epoch), or 0."""
    earlier_redeliveries: int = 0
    """Number of workers lost with the task's earlier entries, before it was parked or requeued."""
    occurrence: str | None = None
    """Schedule of which this is an occurrence: set by the scripts, and kept with the task."""
    survived: int = 0
    """Number of workers that lost this entry but are alive."""
    granted: bytes | None = None
    """Key of the lock that was granted to the task after it had waited."""
    started: bool = False
    """True if another worker had an earlier entry of the task, and may have started it."""

    @classmethod
    def of_fields(cls, stream: str, entry: str, times: int, fields: Sequence[bytes]) -> Self:
        """Make the delivery of an entry that has other fields than its message."""
        values = dict(zip(fields[::2], fields[1::2], strict=False))
        data = values.get(b"data")
        return cls(
            stream,
            entry,
            times,
            data,
            raw=data if data is not None else msgpack.packb(fields),
            since=str(number_of(values.get(b"since"))),
            earlier_redeliveries=number_of(values.get(b"deaths")),
            survived=number_of(values.get(b"survived")),
            occurrence=text_of(values[b"occurrence"]) if b"occurrence" in values else None,
            granted=values.get(b"woken"),
            started=b"started" in values,
        )

    @property
    def redelivery_count(self) -> int:
        """Number of workers lost with the task since its submission or last retry."""
        return self.earlier_redeliveries + self.deliveries - 1 - self.survived

    @property
    def redelivered(self) -> bool:
        """True if another worker had the task before, and may have started it."""
        return self.started or self.earlier_redeliveries + self.deliveries > 1

    cancelled: bool = False
    """True if the task was cancelled before this delivery."""

    @property
    def queued_at(self) -> float:
        """Time of the submission, or of the first wait for a lock (s since the epoch, by the server's clock)."""
        return int(self.since) / 1e6 if self.since != "0" else int(self.entry.partition("-")[0]) / 1e3

    @property
    def priority(self) -> Priority:
        """Priority in the name of the stream."""
        return Priority(self.stream.split(":")[2])


#: Number of lost workers from which a message is a poison candidate.
_CANDIDATE_FROM = 2


def candidate_from(max_deliveries: int) -> int:
    """Number of lost workers from which a message runs alone: at the latest before its last delivery, so that a
    message does not become poison because of another task on the same workers.
    """
    return max(1, min(_CANDIDATE_FROM, max_deliveries - 1))


def is_poison_candidate(delivery: Delivery, max_deliveries: int) -> bool:
    """True if the message may have killed its workers, but is to run again."""
    return candidate_from(max_deliveries) <= delivery.redelivery_count < max_deliveries


@dataclass(slots=True)
class Settlement:
    """Settlement of one delivery. At most one of retry, requeue, isolate and dead is set."""

    delivery: Delivery
    locks: Sequence[LockSpec] = ()
    result: ResultEffect | None = None
    retry: DelayedRetry | None = None
    requeue: Requeue | None = None
    isolate: bool = False
    """Leave the task for a worker that holds nothing else."""
    group: GroupEffect | None = None
    dead: StoredDeadLetter | None = None
    release_results: str | None = None
    """Group whose callback has ended: the results of its children are deleted."""
    outcome: ScheduleEffect | None = None
    """Outcome to store for the task's schedule."""
    reply_lost: bool = False
    """True if it was sent and the reply was lost: it may be settled."""

    def effects(self) -> dict[str, Any]:
        """Effects that are set, for lua/settle.lua; most tasks have none."""
        granted = self.delivery.granted
        has_effects = self.locks or self.group or self.outcome or self.result or self.release_results
        if not (has_effects or granted or self.retry or self.requeue or self.isolate or self.dead):
            return {}
        found = {name: value for name in _EFFECTS if (value := getattr(self, name))}
        if granted and not self.requeue:
            found["granted"] = granted
        return found

    def bytes(self) -> int:
        """Approximate size in a call, with `LOCK_BYTES` for each lock."""
        size = 100
        if self.locks or self.delivery.granted:
            size += LOCK_BYTES * (len(self.locks) or 1)
        if not (self.result or self.retry or self.requeue or self.group or self.dead):  # the usual case
            return size
        parts = (self.result, self.retry, self.requeue, self.group, self.dead)
        values = [value for part in parts if part for value in part.values()]
        return size + sum(len(value) for value in values if isinstance(value, str | bytes))


@dataclass(frozen=True, slots=True)
class SettlingCall:
    """Settlements to send in one write with the blocking read that follows."""

    settlements: Sequence[Settlement]
    dataset_id: str
    on_reply: Callable[[Sequence[SettleReply] | None], None]
    """Called with the replies, or None when the server has refused the call; not called without a reply."""


_EFFECTS = ("locks", "result", "retry", "requeue", "isolate", "group", "dead", "release_results", "outcome")


ReceivedMessage = Delivery
"""Published name of a delivery, with other fields than the published class."""


class SubmitsMessages(Protocol):
    """The part of a broker that `submit_task` needs."""

    async def submit(self, submissions: Sequence[Submission]) -> None:
        """Submit messages."""


async def submit_task(
    broker: SubmitsMessages,
    task_name: str,
    task_args: Sequence[Any] = (),
    task_kwargs: Mapping[str, Any] | None = None,
    *,
    labels: Mapping[str, Any] | None = None,
    task_id: str | None = None,
    run_at: datetime | None = None,
    priority: Priority | str | None = None,
    size: Size | str | None = None,
) -> str:
    """Submit a task by its registry name, without its class. Returns its id.

    Args:
        priority: priority of the queue; by default the label `priority`, else normal.
        size: size of the queue; by default the label `size`, else medium.
        task_id: id of the task, instead of a new one. It must not be that of a task that waits.

    Raises:
        SendTaskError: when the broker cannot be reached.
        DuplicateTaskIdError: when `run_at` is set and another task with this id waits.
    """
    message = TaskMessage(
        task_id=task_id or new_task_id(),
        task_name=task_name,
        labels=checked_labels(labels),
        task_args=list(task_args),
        task_kwargs=dict(task_kwargs or {}),
    )
    await broker.submit([Submission(message, stream_of_labels(message.labels, priority, size), run_at)])
    return message.task_id


@dataclass
class TaskBinding:
    """Registry name of a task, bound to a broker."""

    broker: SubmitsMessages
    task_name: str
    labels: dict[str, Any] = field(default_factory=dict)

    async def submit(
        self, *args: Any, labels: Mapping[str, Any] | None = None, run_at: datetime | None = None, **kwargs: Any
    ) -> str:
        """Submit the task with these arguments. Returns its id; raises as `submit_task`."""
        merged = {**self.labels, **(labels or {})}
        return await submit_task(self.broker, self.task_name, args, kwargs, labels=merged, run_at=run_at)
