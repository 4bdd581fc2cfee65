"""Submitting dead letters again: each once, whoever tries, however often, and wherever it breaks off.

Three steps: the row says so (RESUBMITTING), the server takes the task and remembers the burial in one script,
the row says that it is done (RESUBMITTED). Whoever repeats any of it changes nothing: ADR 16.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from ..broker.labels import LABEL_ATTEMPTS
from ..broker.models import Submission, TaskMessage
from ..broker.redis_streams import RESUBMITTED_TTL_SECONDS
from ..messages.arguments import rebuild
from ..submission.client import Binding
from ..submission.prepare import stream_of
from .letter import OPEN, DeadLetterReason, DeadLetterStatus

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker
    from ..config import TasksConfig
    from ..registry import TaskRegistry
    from .db import LetterFilter, TaskDB

#: Letters in one round: one statement, one script.
BATCH = 100
#: Bytes of their messages in one round, but for a single letter that has more.
_BATCH_BYTES = 16_000_000
#: Begun so long ago, and not ended: the server may have forgotten by now whether it took the task.
_FORGOTTEN_AFTER = timedelta(seconds=RESUBMITTED_TTL_SECONDS - 86400)
#: What is not submitted again without somebody's decision: it killed its workers, and would again.
_NOT_BY_ITSELF = {DeadLetterReason.POISON, DeadLetterReason.UNPARSABLE}


class Fate(StrEnum):
    """What became of the wish to submit a letter again."""

    RESUBMITTED = "resubmitted"
    """Submitted by us."""
    ALREADY = "already"
    """Somebody else has, or we had before."""
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A letter and what became of it."""

    letter: Mapping[str, Any]
    fate: Fate
    why: str = ""
    """Why it was refused."""


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

    async def these(self, letters: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """Submit these rows of the TaskDB (`summaries`) again; not inside a transaction of it.

        Raises:
            SendTaskError: when the broker does not answer. The letters stay RESUBMITTING; repeat it.
            diracx.tasks.plumbing.sql.errors.DatabaseError: when the database does not.
        """
        verdicts: list[Verdict] = []
        for batch in _batches(letters):
            verdicts += await self._round(batch)
        return verdicts

    async def all(self, where: LetterFilter, *, limit: int | None = None) -> AsyncIterator[list[Verdict]]:
        """Submit all open letters again that the filter lets through, oldest first, some at a time.

        Errors as in `these`.
        """
        wanted: LetterFilter = {"status": OPEN, **where}
        after_id, left = 0, limit
        while left is None or left > 0:
            size = BATCH if left is None else min(BATCH, left)
            letters = await self._db.summaries(**wanted, limit=size, after_id=after_id)
            if not letters:
                return
            after_id = letters[-1]["id"]
            left = None if left is None else left - len(letters)
            yield await self.these(letters)

    async def all_by_itself(self) -> AsyncIterator[list[Verdict]]:
        """The same for nobody in particular, at a start: without poison and what cannot be read.

        Errors as in `these`.
        """
        for reason in DeadLetterReason:
            if reason not in _NOT_BY_ITSELF:
                async for verdicts in self.all({"reason": reason}):
                    yield verdicts

    async def _round(self, letters: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        verdicts: dict[int, Verdict] = {}
        prepared: dict[int, tuple[str, Submission]] = {}
        burials = {letter["id"]: letter["burial"] for letter in letters}
        messages = await self._db.messages(list(burials.items()))
        for letter in letters:
            if (message := messages.get(letter["id"])) is None:
                continue  # buried again, or taken away since it was looked at: somebody else's to decide about
            try:
                prepared[letter["id"]] = (ticket(letter), self._submission(letter, message))
            except _RefusedError as refused:
                verdicts[letter["id"]] = Verdict(letter, Fate.REFUSED, str(refused))
        begun = await self._db.begin_resubmission([(number, burials[number]) for number in prepared])
        now = self._db.clock.now()
        forgotten = {number for number, since in begun.items() if now - since > _FORGOTTEN_AFTER}
        taken = [number for number in prepared if number in begun and number not in forgotten]
        if taken:
            submitted = await self._broker.resubmit([prepared[number] for number in taken])
            await self._db.end_resubmission([(number, burials[number]) for number in taken])
        else:
            submitted = []
        ours = {number for number, first in zip(taken, submitted, strict=True) if first}
        for letter in letters:
            number = letter["id"]
            if number in verdicts:
                continue
            if number in forgotten:
                verdicts[number] = Verdict(letter, Fate.REFUSED, _forgotten(begun[number]))
            else:
                verdicts[number] = Verdict(letter, Fate.RESUBMITTED if number in ours else Fate.ALREADY)
        return [verdicts[letter["id"]] for letter in letters]

    def _submission(self, letter: Mapping[str, Any], stored: bytes) -> Submission:
        """The task of a letter, for the queue of its class, with no attempts behind it."""
        if letter["status"] == DeadLetterStatus.DISCARDED:
            raise _RefusedError("it was discarded")
        try:
            message = TaskMessage.loadb(stored)
        except ValueError as error:
            raise _RefusedError(
                "it cannot be read, so nobody knows what to submit; `dlq export` has it"
            ) from error
        task_class = self._binding.registry.get(message.task_name)
        if task_class is None:
            raise _RefusedError(
                f"no task is registered as {message.task_name!r}; install its package, or load it with --module"
            )
        try:
            task = rebuild(task_class, message.task_args, message.task_kwargs, message.sig)
        except Exception as error:
            raise _RefusedError(f"{message.task_name} does not take its arguments: {error}") from error
        message.labels.pop(LABEL_ATTEMPTS, None)
        try:
            stream = stream_of(message.task_name, task, self._binding.config, message.labels)
        except ValueError as error:
            raise _RefusedError(str(error)) from error
        return Submission(message, stream)


def _batches(letters: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    batch: list[Mapping[str, Any]] = []
    total = 0
    for letter in letters:
        total += letter["message_bytes"]
        if batch and (len(batch) == BATCH or total > _BATCH_BYTES):
            yield batch
            batch, total = [], letter["message_bytes"]
        batch.append(letter)
    if batch:
        yield batch


class _RefusedError(Exception):
    """This letter cannot be submitted again."""


def ticket(letter: Mapping[str, Any]) -> str:
    """What the server remembers of a re-submission: the task and the delivery it was buried from."""
    return f"{letter['task_id']}@{letter['burial']}"


def _forgotten(since: datetime) -> str:
    return (
        f"its re-submission broke off on {since:%Y-%m-%d}, and the broker no longer knows if it has the task; "
        "look whether it ran, and submit it by hand if not"
    )
