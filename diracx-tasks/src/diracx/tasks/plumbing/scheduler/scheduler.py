"""The scheduler: submits periodic tasks when they are due, promotes delayed ones. One leads, others stand by."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Coroutine, Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from redis.exceptions import RedisError

from ..binding import Binding
from ..broker import keys, scripts
from ..broker.redis_streams import in_ms
from ..config import TasksConfig
from ..factory import TaskRegistry
from ..patience import Pauses, is_passing
from .occurrences import ScheduledTask, scheduled_tasks

if TYPE_CHECKING:
    from ..base_task import BaseTask
    from ..broker import RedisStreamBroker

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

#: How often a standby looks whether the lead is free: the gap after a clean stop.
_STANDBY_SECONDS = 0.4
_NOT_THE_LEADER = -1


class TaskScheduler:
    """Submits what is due. Any number may run; the next one leads when the leader's lease ends.

    Args:
        vos: the VOs of which each VO-aware task has an instance.
        lease_seconds: how long a dead leader keeps the others waiting, at most.
    """

    def __init__(
        self,
        broker: RedisStreamBroker,
        registry: Mapping[str, type[BaseTask]],
        *,
        config: TasksConfig | None = None,
        vos: Iterable[str] = (),
        lease_seconds: float = 6.0,
    ) -> None:
        self._broker = broker
        self._registry = TaskRegistry.of(registry)
        self._config = config or TasksConfig()
        self._vos = list(vos)
        self._lease_seconds = lease_seconds
        self._token = uuid4().hex
        self._lease: dict[str, Any] = {
            "kind": "mutex",
            "key": keys.LEADER,
            "owner": self._token,
            "ttl_ms": int(lease_seconds * 1000),
        }
        self._reconfigured = asyncio.Event()
        self._pauses = Pauses()
        self._in_trouble = False
        self._scheduled: dict[str, ScheduledTask] = {}
        self.leads = asyncio.Event()
        """Set while this scheduler leads."""
        self.ready = asyncio.Event()
        """Set when it leads for the first time, or knows that another does."""

    def reconfigure(self, config: TasksConfig, vos: Iterable[str]) -> None:
        """Go on with other settings and VOs. Call it in the scheduler's event loop; the leader plans again."""
        self._config, self._vos = config, list(vos)
        self._reconfigured.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Schedule until `stop` is set.

        Raises:
            redis.exceptions.RedisError: when the server does not answer at the start. Later it is waited for.
        """
        await self._broker.startup()
        while not stop.is_set():
            try:
                if await self._take_the_lead():
                    await self._lead(stop)
                else:
                    self._works()
                    self.ready.set()
                    await _unless(stop, asyncio.sleep(_STANDBY_SECONDS))
            except RedisError as error:
                if not is_passing(error):
                    raise
                if not self._in_trouble:
                    logger.warning("cannot schedule: %s; trying again until it works", error)
                self._in_trouble = True
                await _unless(stop, asyncio.sleep(self._pauses.next()))
            finally:
                self.leads.clear()
        try:
            await scripts.release(self._broker.redis, [self._lease])
        except RedisError as error:
            logger.warning("could not hand over the lead: %s; the lease will end by itself", error)

    def _works(self) -> None:
        if self._in_trouble:
            logger.warning("can schedule again")
        self._in_trouble = False
        self._pauses.succeeded()

    async def _take_the_lead(self) -> bool:
        redis = self._broker.redis
        return await scripts.acquire(redis, [self._lease]) or (await scripts.extend(redis, [self._lease]))[0]

    async def _lead(self, stop: asyncio.Event) -> None:
        logger.info("leading")
        if not await self._plan():
            return
        self.leads.set()
        self.ready.set()
        renew_at = time.monotonic() + self._lease_seconds / 3
        while not stop.is_set():
            if self._reconfigured.is_set() and not await self._plan():
                return
            if time.monotonic() >= renew_at:
                if not (await scripts.extend(self._broker.redis, [self._lease]))[0]:
                    logger.warning("lost the lead")
                    return
                renew_at = time.monotonic() + self._lease_seconds / 3
            delayed_ms = await self._broker.promote()
            periodic_ms = await self._submit_due()
            if periodic_ms is None:
                return
            self._works()
            waits_ms = [ms for ms in (delayed_ms, periodic_ms) if ms is not None and ms >= 0]
            pause = min([renew_at - time.monotonic(), *(ms / 1000 for ms in waits_ms)])
            if pause > 0:
                await _unless(stop, _first_of(self._sleep(pause), self._reconfigured.wait()))

    async def _sleep(self, seconds: float) -> None:
        """Until then, or until something is put aside that is due earlier."""
        await self._broker.redis.execute_command("BLPOP", keys.WAKE_SCHEDULER, max(0.001, seconds))

    async def _plan(self) -> bool:
        """Bring the schedules in Redis up to date with code, configuration and VOs. False: somebody else leads."""
        self._reconfigured.clear()
        self._scheduled = scheduled_tasks(self._registry, self._config, self._vos)
        now = datetime.fromtimestamp(await self._now_ms() / 1000, UTC)
        wanted = []
        for scheduled in self._scheduled.values():
            try:
                due = in_ms(scheduled.rule.next_after(now))
            except ValueError as error:
                logger.error("%s is not scheduled: %s", scheduled.id, error)
                continue
            wanted.append({"id": scheduled.id, "due": due, "fingerprint": scheduled.rule.fingerprint})
        logger.info("%d schedules", len(wanted))
        return await scripts.plan(self._broker.redis, self._token, wanted)

    async def _now_ms(self) -> int:
        """The server's clock, which all schedulers share."""
        seconds, microseconds = await self._broker.redis.execute_command("TIME")
        return int(seconds) * 1000 + int(microseconds) // 1000

    async def _submit_due(self) -> int | None:
        """Submit every occurrence that is due.

        Returns:
            Milliseconds until the next one, -1 when there is none; None when somebody else leads.
        """
        redis = self._broker.redis
        now_ms = await self._now_ms()
        due = await redis.execute_command("ZRANGEBYSCORE", keys.NEXT_RUNS, "-inf", now_ms, "WITHSCORES")
        now = datetime.fromtimestamp(now_ms / 1000, UTC)
        for schedule_id, score in zip(due[::2], due[1::2], strict=True):
            if await self._occur(schedule_id.decode(), int(float(score)), now) == _NOT_THE_LEADER:
                logger.warning("lost the lead")
                return None
        first = await redis.execute_command("ZRANGE", keys.NEXT_RUNS, 0, 0, "WITHSCORES")
        return max(0, int(float(first[1])) - now_ms) if first else -1

    async def _occur(self, schedule_id: str, due_ms: int, now: datetime) -> int:
        scheduled = self._scheduled.get(schedule_id)
        if scheduled is None:
            await self._broker.redis.zrem(keys.NEXT_RUNS, schedule_id)
            return 0
        try:
            submission = Binding(self._broker, self._registry, self._config).submission(scheduled.build())
        except Exception:
            logger.exception(
                "%s cannot be submitted and is left out until the scheduler is restarted", schedule_id
            )
            await self._broker.redis.zrem(keys.NEXT_RUNS, schedule_id)
            await self._broker.redis.hdel(keys.FINGERPRINTS, schedule_id)
            return 0
        following = scheduled.next_run_after(datetime.fromtimestamp(due_ms / 1000, UTC), now)
        if following is None:
            logger.info("%s has had its last run", schedule_id)
        message = submission.message
        reply = await scripts.occur(
            self._broker.redis,
            self._token,
            schedule_id,
            due_ms,
            None if following is None else in_ms(following),
            submission.stream,
            message.task_id,
            message.dumpb(),
        )
        logger.debug("%s due at %d: %s", schedule_id, due_ms, reply)
        return reply


async def _first_of(*waiting: Coroutine[Any, Any, Any]) -> None:
    tasks = [asyncio.ensure_future(each) for each in waiting]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for each in done:
            each.result()
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _unless(stop: asyncio.Event, waiting: Awaitable[_Answer]) -> None:
    """Wait for something that may be given up at any moment, unless we are to stop."""
    waits = asyncio.ensure_future(waiting)
    stops = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({waits, stops}, return_when=asyncio.FIRST_COMPLETED)
        if waits.done():
            waits.result()
    finally:
        waits.cancel()
        stops.cancel()
        await asyncio.gather(waits, stops, return_exceptions=True)
