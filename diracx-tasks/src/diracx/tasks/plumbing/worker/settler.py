"""The pipeline through which the broker is told what becomes of deliveries."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from redis.exceptions import ConnectionError as RedisConnectionError

from .._util.retrying import is_transient, retry_until_available
from ..broker import locking
from ..broker.inspection import server_time
from ..broker.labels import LABEL_ATTEMPTS
from ..broker.models import Settlement, TaskMessage, TaskResult
from ..broker.requests import DelayedRetry, Requeue
from ..broker.sizes import ALWAYS_TAKEN_BYTES
from ..exceptions import ResultTooLargeError
from ..messages.error_info import one_line

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker
    from ..broker.requests import LockSpec
    from .intake import Intake
    from .keeper import LeaseKeeper

_Again = TypeVar("_Again", DelayedRetry, Requeue)

logger = logging.getLogger(__name__)

#: A large call counts as refused when the server, which answers others, has closed the connection so often for it.
_TRIES = 3


class Settler:
    """Sends settlements. Those that come together share a round trip; none is lost while the server is away.

    What the server refuses of one of them, by an error or (what is too large for it) by closing the connection,
    holds up no other.

    Args:
        intake: is told of those that have been sent and are held no more.
    """

    def __init__(self, broker: RedisStreamBroker, keeper: LeaseKeeper, intake: Intake) -> None:
        self._broker = broker
        self._keeper = keeper
        self._intake = intake
        self._waiting: list[Settlement] = []
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, settlement: Settlement) -> None:
        """To be sent with the next batch."""
        if not self._waiting:
            self._idle.clear()
            self._work.set()
        self._waiting.append(settlement)

    async def run(self) -> None:
        """Send what there is, for ever."""
        while True:
            await self._work.wait()
            # What ends in the same round of the event loop goes together; and the question for new messages,
            # which is quickly answered, goes first.
            await asyncio.sleep(0)
            self._work.clear()
            batch, self._waiting = self._waiting, []
            try:
                accepted = await self._send(batch)
            except Exception:
                # One of them is not acceptable to the server; the others must not suffer for it.
                accepted = [await self._send_alone(settlement) for settlement in batch]
            deliveries = [settlement.delivery for settlement in batch]
            self._keeper.forget(deliveries)
            self._intake.settled(deliveries)
            for settlement, answer in zip(batch, accepted, strict=True):
                if answer is not True:
                    _report(settlement, answer)
            if not self._waiting:
                self._idle.set()

    async def _send(self, batch: Sequence[Settlement]) -> list[bool | str]:
        """Send settlements; return which were accepted; a text: what of it was refused.

        Raises:
            Exception: when the server refuses the call.
        """
        dataset_id = self._keeper.dataset_id
        replies = await self._ask(batch)
        answers = [False if reply is None else reply for reply in replies]
        if None in replies or False in replies:  # it may have lost its data: it must learn first what we hold
            await retry_until_available(self._keeper.renew, "renew the lease")
            lost = (None,) if self._keeper.dataset_id == dataset_id else (None, False)
            unknown = [position for position, ours in enumerate(replies) if ours in lost]
            again = await self._send([batch[position] for position in unknown])
            for position, ours in zip(unknown, again, strict=True):
                answers[position] = ours
        return answers

    async def _ask(self, batch: Sequence[Settlement]) -> list[bool | str | None]:
        call = partial(self._settle, batch, self._keeper.dataset_id)
        for _ in range(_TRIES - 1):
            try:
                return await retry_until_available(call, "settle tasks", passing=partial(_passing, batch))
            except RedisConnectionError as error:
                if not is_transient(error):
                    raise
                await retry_until_available(partial(server_time, self._broker.redis), "settle tasks")
        return await retry_until_available(call, "settle tasks", passing=partial(_passing, batch))

    async def _settle(self, batch: Sequence[Settlement], dataset_id: str) -> list[bool | str | None]:
        await self._intake.closed_if_stopping()  # our own wait must not be given what goes back to its queue
        return await self._broker.settle(batch, dataset_id)

    async def _send_alone(self, settlement: Settlement) -> bool | str:
        try:
            [answer] = await self._send([settlement])
        except Exception as error:
            refused = one_line(error)
        else:
            return answer
        smaller = [_without_value(settlement, refused)]
        # What keeps the task (or its dead letter) is not left out: without it, the entry stays where it is.
        if not (settlement.retry or settlement.requeue or settlement.dead):
            smaller += [Settlement(settlement.delivery, settlement.locks), Settlement(settlement.delivery)]
        for each in smaller:
            try:
                await self._send([each])
                return refused
            except Exception as error:
                refused = f"{refused}; {one_line(error)}"
        await self._release(settlement.locks)
        return f"kept: {refused}"

    async def _release(self, locks: Sequence[LockSpec]) -> None:
        """Give back the locks of what does not run any more, although it cannot be settled."""
        if locks:
            try:
                await retry_until_available(partial(locking.release, self._broker.redis, locks), "give locks back")
            except Exception as error:
                logger.error("cannot give locks back: %s", one_line(error))

    async def drained(self) -> None:
        """Return when everything that was added has been sent."""
        await self._idle.wait()


def _passing(batch: Sequence[Settlement], error: BaseException) -> bool:
    """True if the call is to be repeated: a server closes the connection when a call is too large for it."""
    if isinstance(error, RedisConnectionError) and sum(map(Settlement.bytes, batch)) > ALWAYS_TAKEN_BYTES:
        return False
    return is_transient(error)


def _without_value(settlement: Settlement, refused: str) -> Settlement:
    """The same with an error in place of the result, and with short attempts of what runs again."""
    error = ResultTooLargeError(f"the server refuses what follows on the task: {refused}")
    value = TaskResult.from_exception(error, 0.0).dumpb()
    result, group = settlement.result, settlement.group
    if result is not None:
        result = {**result, "value": value}
    if group is not None and "result" in group:
        group = {**group, "result": value}
    retry, requeue = _with_short_attempts(settlement.retry), _with_short_attempts(settlement.requeue)
    return replace(settlement, result=result, group=group, retry=retry, requeue=requeue)


def _with_short_attempts(again: _Again | None) -> _Again | None:
    if again is None or again["data"] is None:
        return again
    try:
        message = TaskMessage.loadb(again["data"])
    except ValueError:  # it is for a later version
        return again
    attempts = [{**each, "message": each.get("message", "")[:100], "traceback": ""} for each in message.attempts]
    if attempts:
        message.labels[LABEL_ATTEMPTS] = attempts
    again = again.copy()
    again["data"] = message.dumpb()
    return again


def _report(settlement: Settlement, answer: bool | str) -> None:
    entry = settlement.delivery.entry
    if answer is False:
        logger.warning("%s was not ours to settle any more", entry)
    elif isinstance(answer, str) and answer.startswith("kept"):
        logger.critical("%s is not settled, for the server refuses what must be %s", entry, answer)
    else:
        logger.critical("what follows on %s is refused by the server and left out: %s", entry, answer)
