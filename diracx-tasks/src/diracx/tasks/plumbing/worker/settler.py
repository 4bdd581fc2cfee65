"""Sends the settlements of a worker to the broker, in batches."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING, TypeVar

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from .._util.retrying import is_transient, retry_until_available
from ..broker import locking
from ..broker.inspection import server_time
from ..broker.labels import LABEL_ATTEMPTS
from ..broker.models import Settlement, SettlingCall, TaskMessage, TaskResult
from ..broker.redis_streams import SETTLE_BATCH
from ..broker.replies import ACCEPTED, DATA_LOST, TAKEN_OVER, SettleReply
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

#: A large call counts as refused after so many closed connections, while the server replies to other calls.
_TRIES = 3
#: How long taken settlements wait for their reply: the connection of the other call may be dead.
_REPLY_SECONDS = 5.0


class Settler:
    """Sends settlements, in batches; while the server is unavailable, they wait in memory.

    A settlement that the server refuses, by an error or (if it is too large) by closing the connection, does not
    delay the others.

    Args:
        intake: notified of settled deliveries.
    """

    def __init__(self, broker: RedisStreamBroker, keeper: LeaseKeeper, intake: Intake) -> None:
        self._broker = broker
        self._keeper = keeper
        self._intake = intake
        self._waiting: list[Settlement] = []
        self._taken: Sequence[Settlement] = ()
        """Settlements that are sent with another call, until its reply."""
        self._late: asyncio.TimerHandle | None = None
        self._returned: Sequence[Settlement] = ()
        """Settlements that were taken and not settled; they are not taken again."""
        self._unsettled = 0
        self._may_be_taken = False
        """True if the last call was accepted: the server has the script, and refuses nothing now."""
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, settlement: Settlement) -> None:
        """Send it with the next batch."""
        if not self._unsettled:
            self._idle.clear()
        if not self._waiting:
            self._work.set()
        self._unsettled += 1
        self._waiting.append(settlement)

    async def run(self) -> None:
        """Send the settlements that arrive, until cancelled."""
        while True:
            await self._work.wait()
            # Collect those of the same round of the event loop. The intake may take them for its next call.
            await asyncio.sleep(0)
            await self._intake.wait_for_fetch()
            self._work.clear()
            batch, self._waiting, self._returned = [*self._returned, *self._waiting], [], ()
            if not batch:  # the intake has taken them
                continue
            try:
                replies = await self._send(batch)
                self._may_be_taken = True
            except Exception:
                # The server refuses one of them; send them one by one.
                replies = [await self._send_alone(settlement) for settlement in batch]
            self._settled(batch, replies)

    def _settled(self, batch: Sequence[Settlement], replies: Sequence[SettleReply]) -> None:
        deliveries = [settlement.delivery for settlement in batch]
        self._keeper.forget(deliveries)
        self._intake.settled(deliveries)
        for settlement, reply in zip(batch, replies, strict=True):
            if reply != ACCEPTED:
                # Without an end of the lease, no other worker can have taken it over.
                settled = settlement.reply_lost and not self._keeper.expired_since(0.0)
                _report(settlement.delivery.entry, reply, settled)
        self._unsettled -= len(batch)
        if not self._unsettled:
            self._idle.set()

    def take(self) -> SettlingCall | None:
        """Take what waits to be sent, for one write with another call; None: nothing, or too much for that.
        `return_unsent` has to follow.
        """
        waiting = self._waiting
        if not (waiting and self._may_be_taken) or len(waiting) > SETTLE_BATCH:
            return None
        if sum(map(Settlement.bytes, waiting)) > ALWAYS_TAKEN_BYTES:
            return None
        self._taken, self._waiting = waiting, []
        self._late = asyncio.get_running_loop().call_later(_REPLY_SECONDS, self.return_unsent)
        return SettlingCall(waiting, self._keeper.dataset_id, partial(self._on_reply, waiting))

    def _on_reply(self, batch: Sequence[Settlement], replies: Sequence[SettleReply] | None) -> None:
        if self._taken is not batch:  # the reply came too late
            return
        self._taken = ()
        if replies is None:
            self._taken, self._may_be_taken = batch, False
        elif DATA_LOST in replies or TAKEN_OVER in replies:
            lost = [reply in (DATA_LOST, TAKEN_OVER) for reply in replies]
            self._return(list(compress(batch, lost)))
            known = [not each for each in lost]
            self._settled(list(compress(batch, known)), list(compress(replies, known)))
        else:
            self._settled(batch, replies)
        self.return_unsent()

    def return_unsent(self) -> None:
        """Send what was taken and is not settled, as if it had not been taken."""
        if self._late is not None:
            self._late.cancel()
        if self._taken:
            taken, self._taken = self._taken, ()
            _note_lost_reply(taken)
            self._return(taken)

    def _return(self, batch: Sequence[Settlement]) -> None:
        self._returned = [*self._returned, *batch]
        self._work.set()

    async def _send(self, batch: Sequence[Settlement]) -> list[SettleReply]:
        """Send settlements, those that the server has lost again after a renewal.

        Raises:
            Exception: when the server refuses the call.
        """
        dataset_id = self._keeper.dataset_id
        replies = await self._call(batch)
        # After a loss of data, a renewal must restore the held entries first.
        if DATA_LOST in replies or TAKEN_OVER in replies:
            await retry_until_available(self._keeper.renew, "renew the lease")
            lost = (DATA_LOST,) if self._keeper.dataset_id == dataset_id else (DATA_LOST, TAKEN_OVER)
            unknown = [position for position, reply in enumerate(replies) if reply in lost]
            again = await self._send([batch[position] for position in unknown])
            for position, reply in zip(unknown, again, strict=True):
                replies[position] = reply
        return replies

    async def _call(self, batch: Sequence[Settlement]) -> list[SettleReply]:
        call = partial(self._settle, batch, self._keeper.dataset_id)
        for _ in range(_TRIES - 1):
            try:
                return await retry_until_available(call, "settle tasks", passing=partial(_passing, batch))
            except RedisConnectionError as error:
                if not is_transient(error):
                    raise
                await retry_until_available(partial(server_time, self._broker.redis), "settle tasks")
        return await retry_until_available(call, "settle tasks", passing=partial(_passing, batch))

    async def _settle(self, batch: Sequence[Settlement], dataset_id: str) -> list[SettleReply]:
        await self._intake.closed_if_stopping()  # the worker's own blocking read must not get a requeued task
        try:
            return await self._broker.settle(batch, dataset_id)
        except RedisError:
            _note_lost_reply(batch)
            raise

    async def _send_alone(self, settlement: Settlement) -> SettleReply:
        try:
            [reply] = await self._send([settlement])
        except Exception as error:
            refused = one_line(error)
        else:
            return reply
        smaller = [_without_value(settlement, refused)]
        # A retry, a requeue or a dead letter is never left out, or the task would be lost: the entry stays
        # pending.
        if not (settlement.retry or settlement.requeue or settlement.dead):
            smaller += [Settlement(settlement.delivery, settlement.locks), Settlement(settlement.delivery)]
        for each in smaller:
            try:
                await self._send([each])
                return SettleReply(accepted=True, refused=refused)
            except Exception as error:
                refused = f"{refused}; {one_line(error)}"
        await self._release(settlement.locks)
        return SettleReply(refused=refused)

    async def _release(self, locks: Sequence[LockSpec]) -> None:
        """Release the locks of a task that has ended but cannot be settled."""
        if locks:
            try:
                await retry_until_available(partial(locking.release, self._broker.redis, locks), "release locks")
            except Exception as error:
                logger.error("cannot release locks: %s", one_line(error))

    async def drained(self) -> None:
        """Wait until all settlements are sent."""
        await self._idle.wait()


def _passing(batch: Sequence[Settlement], error: BaseException) -> bool:
    """True if the call is to be repeated: not if its size may be why the server has closed the connection."""
    if isinstance(error, RedisConnectionError) and sum(map(Settlement.bytes, batch)) > ALWAYS_TAKEN_BYTES:
        return False
    return is_transient(error)


def _without_value(settlement: Settlement, refused: str) -> Settlement:
    """The settlement with an error in place of the result, and with shortened attempts in a retry or requeue."""
    error = ResultTooLargeError(f"the server refuses the result of the task: {refused}")
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
    except ValueError:  # a message for a later version
        return again
    attempts = [{**each, "message": each.get("message", "")[:100], "traceback": ""} for each in message.attempts]
    if attempts:
        message.labels[LABEL_ATTEMPTS] = attempts
    again = again.copy()
    again["data"] = message.dumpb()
    return again


def _note_lost_reply(batch: Sequence[Settlement]) -> None:
    for settlement in batch:
        settlement.reply_lost = True


def _report(entry: str, reply: SettleReply, settled: bool) -> None:
    if not (reply.accepted or reply.refused):
        if settled:
            logger.info("%s was settled by an earlier call, whose reply was lost", entry)
            return
        logger.warning("%s cannot be settled: another worker has taken it over", entry)
        return
    text = "an effect of the end of %s is refused by the server and left out: %s"
    if not reply.accepted:
        text = "%s is not settled: the server refuses an effect that must be kept: %s"
    logger.critical(text, entry, reply.refused)
