"""Messages and their life: message of a task, its delivery to a worker, its outcome, and the settlement."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import Any, Generic, Protocol, Self, TypeVar

import msgpack

from ..enums import Priority, Size
from ..exceptions import NewerMessageError, ResultIsMissingError
from ..messages.codec import dumps, loads
from ..messages.error_info import ErrorInfo, cut, describe_exception
from .labels import LABEL_ATTEMPTS, check_labels, checked_labels, stream_of_labels
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

_Value = TypeVar("_Value")

_SEQUENCE = (list, tuple)
_LONGEST_REASON = 300
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

#: Of messages. One that older versions cannot execute, or not decode, says so by a greater number in its field
#: `format`, and is still a msgpack map that begins with the task's id.
FORMAT = 1


def new_task_id() -> str:
    """A new task id: 32 hexadecimal digits."""
    return os.urandom(16).hex()


def in_ms(moment: datetime) -> int:
    """Milliseconds since the epoch, rounded up. A naive datetime is taken as UTC."""
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return -((_EPOCH - moment) // timedelta(milliseconds=1))


@dataclass(kw_only=True, slots=True)
class TaskMessage:
    """A task on its way. The same id goes with it for its whole life."""

    task_id: str
    task_name: str
    """Registry name, `{category}:{ClassName}`."""
    labels: dict[str, Any] = field(default_factory=dict)
    task_args: list[Any] = field(default_factory=list)
    task_kwargs: dict[str, Any] = field(default_factory=dict)
    trace_context: dict[str, str] = field(default_factory=dict)
    """W3C trace headers of the submitter."""
    sig: int = 0
    """Hash of the names of the fields whose values are in `task_args`; 0: not known. Others pass it over."""
    later_fields: dict[str, Any] | None = field(default=None, init=False)
    """Fields that a later version has added: kept, and sent on."""

    def dumpb(self) -> bytes:
        """The message as it is stored, with all fields that version 0.7 needs.

        Raises:
            TypeError: when an argument or a label has a type that cannot travel.
        """
        fields: dict[str, Any] = {"task_id": self.task_id, "task_name": self.task_name}  # the id must be the first
        fields["labels"] = self.labels
        if self.sig:  # before the arguments: who reads a beginning only, must know whose they are
            fields["sig"] = self.sig
        fields["task_args"] = self.task_args
        fields["task_kwargs"] = self.task_kwargs
        fields["trace_context"] = self.trace_context
        if self.later_fields:
            fields |= self.later_fields
        return dumps(fields)

    @classmethod
    def loadb(cls, data: bytes, *, careful: bool = False) -> Self:
        """Read a stored message.

        Args:
            careful: see `wire.loads`.

        Raises:
            NewerMessageError: when it is for a later version; a ValueError.
            ValueError: when the bytes are no task message.
        """
        try:
            try:
                fields = loads(data, careful=careful)
            except ValueError:
                if not careful:
                    _refuse_newer(_format_of(data))  # it may have values of a type that came later
                raise
            _refuse_newer(fields.get("format"))
            try:
                message = cls(**fields)
            except TypeError:  # those of a later version are carried along
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
        if not all(isinstance(text, str) for pair in message.trace_context.items() for text in pair):
            raise ValueError("not a task message: its trace context is no text")
        if message.labels:
            try:
                check_labels(message.labels)
            except ValueError as error:
                raise ValueError(f"not a task message: {error}") from error
        return message

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """The failed attempts so far, oldest first: type, message, traceback, host, started, ended."""
        found: list[dict[str, Any]] = self.labels.get(LABEL_ATTEMPTS, [])
        return found


def _refuse_newer(number: Any) -> None:
    if type(number) is int and number > FORMAT:
        raise NewerMessageError(f"its format is {number}, and this version knows up to {FORMAT}")


def _format_of(data: bytes) -> Any:
    """The field `format` of a whole message, without decoding other values; None where there is none."""
    unpacker, number = msgpack.Unpacker(strict_map_key=False), None
    unpacker.feed(data)
    try:
        for _ in range(unpacker.read_map_header()):
            if unpacker.unpack() == "format":
                number = unpacker.unpack()
            else:
                unpacker.skip()
    except Exception:  # msgpack has no common class of its errors
        return None
    return number if unpacker.tell() == len(data) else None


_FIELDS = frozenset(name for name, each in TaskMessage.__dataclass_fields__.items() if each.init)
_HEAD = b"\xa7task_id"
_FIXED_TEXT, _TEXT_8 = range(0xA0, 0xC0), 0xD9


def id_at_head(data: bytes) -> bytes | None:
    """The task id of a message that may be unreadable otherwise; None when it is not where we write it.

    As `task_of` in lua/_cancel.lua does it.
    """
    if data[1:9] != _HEAD or len(data) < 11:
        return None
    if data[9] in _FIXED_TEXT:
        return data[10 : 10 + data[9] - 0xA0]
    return data[11 : 11 + data[10]] if data[9] == _TEXT_8 else None


@dataclass(kw_only=True, slots=True)
class TaskResult(Generic[_Value]):
    """Result of a task, as it is stored for its reader."""

    is_err: bool
    return_value: _Value
    execution_time: float
    """Seconds that the last execution took."""
    error: dict[str, str] | None = None
    """`type`, `message` and `traceback` of the exception, when it failed."""
    labels: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_value(
        cls, value: Any, execution_time: float, labels: dict[str, Any] | None = None
    ) -> TaskResult[Any]:
        """The result of a task that succeeded."""
        return TaskResult(is_err=False, return_value=value, execution_time=execution_time, labels=labels or {})

    @classmethod
    def from_exception(
        cls, exc: BaseException, execution_time: float, labels: dict[str, Any] | None = None
    ) -> TaskResult[None]:
        """The result of a task that finally failed."""
        return cls.from_error(describe_exception(exc), execution_time, labels)

    @classmethod
    def from_error(
        cls, error: ErrorInfo, execution_time: float, labels: dict[str, Any] | None = None
    ) -> TaskResult[None]:
        """The same, of an exception that is text already."""
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
        """The result as it is stored."""
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
        """Read a stored result.

        Raises:
            ResultIsMissingError: when there is none.
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
    """A message and the queue it goes to."""

    message: TaskMessage
    stream: str
    at_time: datetime | None = None
    """Not before this moment; None for now."""

    def dumpb(self) -> bytes:
        """The message as it is sent.

        Raises:
            TypeError: when an argument or a label has a type that cannot travel.
            TaskTooLargeError: when it is too large.
        """
        data = self.message.dumpb()
        return data if len(data) <= SMALL_BYTES else checked_size(data, self.message.task_name)


@dataclass(slots=True)  # frozen would cost more than everything else that is done to make one
class Delivery:
    """A message in the hands of one worker. Whoever settles it must still be its owner."""

    stream: str
    entry: str
    """Id of the stream entry."""
    deliveries: int
    """Number of deliveries, this one included: more than one means that a worker died with it."""
    data: bytes | None
    """The stored message; None when the entry has none."""
    raw: bytes
    """Everything the entry holds, for the dead-letter queue when it cannot be read."""
    since: str = "0"
    """Time when it first began to wait for a lock (µs since the epoch), or 0."""
    earlier_redeliveries: int = 0
    """Number of workers that died with it before it was parked or handed back: entries before this one."""
    occurrence: str | None = None
    """Of which schedule it is an occurrence: a mark that the scripts put on it and that must stay with it."""
    survived: int = 0
    """Number of the workers that lost this entry but are alive."""
    granted: bytes | None = None
    """The key of the lock for which it was granted the turn, after it had waited."""

    @property
    def redelivery_count(self) -> int:
        """Number of workers that died with it since it was submitted or last retried."""
        return self.earlier_redeliveries + self.deliveries - 1 - self.survived

    @property
    def redelivered(self) -> bool:
        """True if another worker had it before, and may have begun it."""
        return self.earlier_redeliveries + self.deliveries > 1

    cancelled: bool = False
    """True if it was cancelled before it got here."""

    @property
    def queued_at(self) -> float:
        """Time when it came, or began to wait for a lock: seconds since the epoch, by the server's clock."""
        return int(self.since) / 1e6 if self.since != "0" else int(self.entry.partition("-")[0]) / 1e3

    @property
    def priority(self) -> Priority:
        """Taken from the name of the stream."""
        return Priority(self.stream.split(":")[2])


@dataclass(slots=True)
class Settlement:
    """Settlement of one delivery. At most one of retry, requeue, aside and dead is set."""

    delivery: Delivery
    locks: Sequence[LockSpec] = ()
    result: ResultEffect | None = None
    retry: DelayedRetry | None = None
    requeue: Requeue | None = None
    aside: bool = False
    """Leave it for a worker that holds nothing else."""
    group: GroupEffect | None = None
    dead: StoredDeadLetter | None = None
    release_results: str | None = None
    """The group whose children's results are needed no more: its callback has ended."""
    outcome: ScheduleEffect | None = None
    """Outcome that a schedule stores of its occurrence."""

    def effects(self) -> dict[str, Any]:
        """Effects that are set, for lua/settle.lua; of most tasks none is."""
        values = _effects(self)
        found = {name: value for name, value in zip(_EFFECTS, values, strict=True) if value} if any(values) else {}
        if self.delivery.granted and not self.requeue:
            found["granted"] = self.delivery.granted
        return found

    def bytes(self) -> int:
        """About how much has to be sent, or keeps the server busy for as long."""
        size = 100 + LOCK_BYTES * (len(self.locks) or bool(self.delivery.granted))
        if not (self.result or self.retry or self.requeue or self.group or self.dead):  # nearly always
            return size
        parts = (self.result, self.retry, self.requeue, self.group, self.dead)
        values = [value for part in parts if part for value in part.values()]
        return size + sum(len(value) for value in values if isinstance(value, str | bytes))


_EFFECTS = ("locks", "result", "retry", "requeue", "aside", "group", "dead", "release_results", "outcome")
_effects = attrgetter(*_EFFECTS)


ReceivedMessage = Delivery
"""The published name of what a worker receives. Its fields are ours."""


class SubmitsMessages(Protocol):
    """A broker, as `submit_task` needs it."""

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
        priority: else the label of this name, else normal.
        size: else the label of this name, else medium.
        task_id: the id, instead of a new one. One id is one task, as long as it waits.

    Raises:
        SendTaskError: when the broker cannot be reached.
        DuplicateTaskIdError: when it is not due yet, and another task with this id waits.
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
    """The registry name of a task at a broker."""

    broker: SubmitsMessages
    task_name: str
    labels: dict[str, Any] = field(default_factory=dict)

    async def submit(
        self, *args: Any, labels: Mapping[str, Any] | None = None, run_at: datetime | None = None, **kwargs: Any
    ) -> str:
        """Submit the task with these arguments. Returns its id; raises as `submit_task`."""
        merged = {**self.labels, **(labels or {})}
        return await submit_task(self.broker, self.task_name, args, kwargs, labels=merged, run_at=run_at)
