"""Takes the locks of executions before they run, those of all deliveries that came together in one call."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .._util.retrying import is_transient, retry_until_available
from ..broker.locking import can_be_packed
from ..broker.replies import StartReply
from ..broker.sizes import LOCK_BYTES, in_calls
from ..broker.streams import resumed_stream
from ..enums import Priority
from ..messages.error_info import one_line

if TYPE_CHECKING:
    from ..broker import RedisStreamBroker
    from ..broker.requests import LockSpec, StartRequest
    from .execution import Execution
    from .keeper import LeaseKeeper
    from .reporter import Reporter
    from .settings import WorkerSettings

_RANK = {priority: rank for rank, priority in enumerate(Priority)}


class LockAcquirer:
    """Takes the locks of executions. The broker parks a task whose lock is not granted.

    Args:
        stop: set when the worker is to stop.
        reject: settles an execution whose locks cannot be taken at all, with the reason, and releases those given.
    """

    def __init__(
        self,
        broker: RedisStreamBroker,
        settings: WorkerSettings,
        stop: asyncio.Event,
        *,
        keeper: LeaseKeeper,
        reporter: Reporter,
        reject: Callable[[Execution, str, Sequence[LockSpec]], None],
    ) -> None:
        self._broker = broker
        self._settings = settings
        self._stop = stop
        self._keeper = keeper
        self._reporter = reporter
        self._reject = reject

    async def take(self, requested: Sequence[Execution]) -> tuple[set[Execution], float]:
        """Take the locks of each execution.

        Returns:
            The executions that must not run here, and a time before the locks of the others were granted
            (`time.monotonic`).

        Raises:
            Exception: when the worker is stopped while the server is unavailable.
        """
        replies: list[StartReply] = []
        granted_at = math.inf
        for portion in in_calls(requested, len(requested), lambda each: LOCK_BYTES * len(each.locks)):
            of_portion, sent_at = await self._take(portion)
            replies += of_portion
            granted_at = min(granted_at, sent_at)
        refused = {
            execution
            for execution, reply in zip(requested, replies, strict=True)
            if not reply.granted or (execution.locks and not self._grant(execution, reply.token))
        }
        self._reporter.count_lock_replies(requested, replies)
        return refused, granted_at

    async def _take(self, requested: Sequence[Execution]) -> tuple[list[StartReply], float]:
        """Take the locks of each execution. An error of the server for one of them makes that one a dead letter.

        Returns:
            The reply to each, and a time before they were granted (`time.monotonic`).
        """
        requests = [self._request(execution) for execution in requested]
        granted_at = time.monotonic()

        async def start() -> list[StartReply]:
            nonlocal granted_at
            # After a failover the keeper may still wait for a reply of the replaced server.
            if self._keeper.late:
                await self._keeper.renew()
            granted_at = time.monotonic()
            return await self._broker.start(requests, lease_seconds=self._settings.lease_seconds)

        try:
            return await retry_until_available(start, "take locks", stop=self._stop), granted_at
        except Exception as error:
            if is_transient(error):  # raised only when the worker stops
                raise
            if len(requested) > 1:
                one_by_one = [await self._take([execution]) for execution in requested]
                return [reply for replies, _ in one_by_one for reply in replies], granted_at
            [execution] = requested
            locks = execution.locks if can_be_packed(execution.locks) else ()
            self._reject(execution, f"its locks cannot be taken: {one_line(error)}", locks)
            return [StartReply(granted=False)], granted_at

    def _request(self, execution: Execution) -> StartRequest:
        delivery = execution.delivery
        request: StartRequest = {
            "stream": delivery.stream,
            "entry": delivery.entry,
            "deliveries": delivery.deliveries,
            "task": execution.message.task_id,
            "rank": _RANK[delivery.priority],
            "resumed": resumed_stream(delivery.stream),
            "since": delivery.since,
            "locks": execution.locks,
            "retry_ms": int(self._settings.lock_retry_seconds * 1000),
        }
        if delivery.granted is not None:
            request["granted"] = delivery.granted
        return request

    def _grant(self, execution: Execution, token: int) -> bool:
        try:
            execution.grant(token)
        except BaseException as error:  # the lock may be a custom one, which may raise anything
            self._reject(execution, f"its locks cannot be granted: {one_line(error)}", execution.locks)
            return False
        return True
