"""Submits dead letters again, each exactly once, even if it is repeated, concurrent or interrupted.

Three idempotent steps: mark the row as RESUBMITTING; submit the task and record its delivery, in one script; mark
the row as RESUBMITTED. See ADR 16.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from ..broker.labels import LABEL_ATTEMPTS, LABEL_RETRIES
from ..broker.models import Submission, TaskMessage
from ..messages.arguments import rebuild
from ..submission.client import Binding, stream_of
from .dead_letter import FORGOTTEN_AFTER, OPEN, DeadLetterReason, DeadLetterStatus

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker
    from ..config import TasksConfig
    from ..registry import TaskRegistry
    from .db import DeadLetterFilter, TaskDB

#: Maximum number of dead letters in a batch.
BATCH = 100
#: Maximum size of their messages, except of a single larger one.
_BATCH_BYTES = 16_000_000
#: Only submitted again by an operator.
_NEVER_AUTOMATIC = {DeadLetterReason.POISON, DeadLetterReason.UNPARSABLE}
_FORGOTTEN = (
    "its re-submission was interrupted on {:%Y-%m-%d}, and the broker has no record of it any more; "
    "check whether the task ran, submit it yourself if not, and discard the dead letter"
)


class ResubmitStatus(StrEnum):
    """State of a dead letter after a re-submission."""

    RESUBMITTED = "resubmitted"
    """Submitted now."""
    ALREADY = "already"
    """Submitted earlier, or by another process."""
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class ResubmitResult:
    """Result of the re-submission of one dead letter."""

    dead_letter: Mapping[str, Any]
    status: ResubmitStatus
    why: str = ""
    """Reason of the refusal."""


class Resubmitter:
    """Submits dead letters again."""

    def __init__(
        self,
        db: TaskDB,
        broker: RedisStreamBroker,
        registry: TaskRegistry,
        config: TasksConfig | None = None,
    ) -> None:
        self._db = db
        self._broker = broker
        self._binding = Binding(broker, registry, config)

    async def resubmit(self, rows: Sequence[Mapping[str, Any]]) -> list[ResubmitResult]:
        """Submit these rows of the TaskDB (`summaries`) again; call it outside a transaction of the TaskDB.

        Raises:
            SendTaskError: the broker does not respond. The dead letters stay RESUBMITTING; repeat the call.
            diracx.tasks.plumbing.sql.errors.DatabaseError: the database does not respond.
        """
        results: list[ResubmitResult] = []
        for batch in _batches(rows):
            results += await self._round(batch)
        return results

    async def resubmit_all(self, where: DeadLetterFilter) -> AsyncIterator[list[ResubmitResult]]:
        """Submit all open dead letters again that match the filter, oldest first; yield the results of each batch.

        Errors as in `resubmit`.
        """
        conditions: DeadLetterFilter = {"status": OPEN, **where}
        after_id = 0
        while rows := await self._db.summaries(**conditions, limit=BATCH, after_id=after_id):
            after_id = rows[-1]["id"]
            yield await self.resubmit(rows)

    async def resubmit_automatic(self) -> AsyncIterator[list[ResubmitResult]]:
        """Submit all open dead letters again, except poison tasks and undecodable messages.

        Errors as in `resubmit`.
        """
        for reason in DeadLetterReason:
            if reason not in _NEVER_AUTOMATIC:
                async for results in self.resubmit_all({"reason": reason}):
                    yield results

    async def _round(self, rows: Sequence[Mapping[str, Any]]) -> list[ResubmitResult]:
        results: dict[int, ResubmitResult] = {}
        prepared: dict[int, tuple[str, Submission]] = {}
        ids = {row["id"]: row["delivery_id"] for row in rows}
        messages = await self._db.messages(list(ids.items()))
        for row in rows:
            if (message := messages.get(row["id"])) is None:
                continue  # failed again or removed meanwhile
            try:
                prepared[row["id"]] = (ticket(row), self._submission(row, message))
            except _RefusedError as refused:
                results[row["id"]] = ResubmitResult(row, ResubmitStatus.REFUSED, str(refused))
        begun = await self._db.begin_resubmission([(number, ids[number]) for number in prepared])
        now = self._db.clock.now()
        forgotten = {number for number, since in begun.items() if now - since > FORGOTTEN_AFTER}
        taken = [number for number in prepared if number in begun and number not in forgotten]
        submitted: Sequence[bool] = []
        if taken:
            submitted = await self._broker.resubmit([prepared[number] for number in taken])
            await self._db.end_resubmission([(number, ids[number]) for number in taken])
        accepted = {number for number, first in zip(taken, submitted, strict=True) if first}
        for row in rows:
            if (number := row["id"]) in forgotten:
                results[number] = ResubmitResult(row, ResubmitStatus.REFUSED, _FORGOTTEN.format(begun[number]))
            elif number not in results:
                status = ResubmitStatus.RESUBMITTED if number in accepted else ResubmitStatus.ALREADY
                results[number] = ResubmitResult(row, status)
        return [results[row["id"]] for row in rows]

    def _submission(self, row: Mapping[str, Any], stored: bytes) -> Submission:
        """Make the submission of a dead letter to the queue of its class, without its earlier attempts."""
        if row["status"] == DeadLetterStatus.DISCARDED:
            raise _RefusedError("it was discarded")
        try:
            message = TaskMessage.loadb(stored)
        except ValueError as error:
            raise _RefusedError("its message cannot be decoded; `dlq export` has the bytes") from error
        task_class = self._binding.registry.get(message.task_name)
        if task_class is None:
            raise _RefusedError(
                f"no task is registered as {message.task_name!r}; install its package, or load it with --module"
            )
        try:
            task = rebuild(task_class, message.task_args, message.task_kwargs, message.sig)
        except Exception as error:
            raise _RefusedError(f"{message.task_name} does not accept its arguments: {error}") from error
        message.labels.pop(LABEL_ATTEMPTS, None)
        message.labels.pop(LABEL_RETRIES, None)
        try:
            stream = stream_of(message.task_name, task, self._binding.config, message.labels)
        except ValueError as error:
            raise _RefusedError(str(error)) from error
        return Submission(message, stream)


def _batches(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    batch: list[Mapping[str, Any]] = []
    total = 0
    for row in rows:
        total += row["message_bytes"]
        if batch and (len(batch) == BATCH or total > _BATCH_BYTES):
            yield batch
            batch, total = [], row["message_bytes"]
        batch.append(row)
    if batch:
        yield batch


class _RefusedError(Exception):
    """Refusal of a re-submission, with the reason."""


def ticket(row: Mapping[str, Any]) -> str:
    """Return the id of a re-submission on the server: the task and its failed delivery."""
    return f"{row['task_id']}@{row['delivery_id']}"
