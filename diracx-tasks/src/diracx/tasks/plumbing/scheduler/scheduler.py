"""The scheduler: submits due periodic tasks and promotes delayed ones. One leads, the others are in standby."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from .._util.retrying import Outage, is_transient, reason
from .._util.tasks import cancel_and_wait
from ..broker import scheduling
from ..broker.group_audit import audit_periodically
from ..broker.listening import listening
from ..broker.models import in_ms
from ..broker.server_check import Role
from ..config import TasksConfig, load_tasks_config
from ..messages.error_info import describe_exception, one_line
from ..registry import TaskRegistry, load_task_registry
from ..submission.client import Binding
from .agenda import Agenda
from .clock import ServerClock
from .leadership import Leadership
from .occurrences import MISSED_SECONDS, ScheduledTask, iter_schedules

if TYPE_CHECKING:
    from diracx.core.config import Config

    from ..base_task import BaseTask
    from ..broker import RedisStreamBroker
    from ..broker.requests import Occurrence, PlanStep

logger = logging.getLogger(__name__)

#: Occurrences submitted by one script call: 2 ms of the server's time.
OCCUR_BATCH = 250
#: Schedules that one script call updates: 1 ms of the server's time.
PLAN_BATCH = 250
#: Longest time to prepare submissions before the event loop runs other tasks.
_PREPARE_SECONDS = 0.003
#: Time before a due time in which no preparation starts, which could delay the submission.
_CALM_SECONDS = 0.02
#: Longest time to prepare late occurrences before some of them are submitted.
_PREPARE_LATE_SECONDS = 0.02
#: Interval of the retries of a schedule that cannot be submitted.
_RETRY_SECONDS = 60.0
#: Delay of timers after the due time, so that the server never replies "too early".
_MARGIN_SECONDS = 0.0003
_LONGEST_PROBLEM = 500
#: Schedules that are named in one log line.
_SHOWN = 5
#: Instances looked up in the configuration before the event loop runs other tasks.
_LOOKUP_BATCH = 20

#: Replies of lua/occur.lua.
_NOT_DUE, _SUBMITTED, _TOO_EARLY, _PAUSED, _REFUSED = 0, 1, 3, 4, 6


@dataclass(frozen=True)
class _Sent:
    """Batch of occurrences sent to the server."""

    batch: list[Occurrence]
    replies: asyncio.Task[list[int] | None]


class TaskScheduler:
    """Submits due periodic and delayed tasks. Any number of schedulers may run; one leads at a time.

    Args:
        vos: VOs for which each VO-aware task has an instance.
        lease_seconds: lease of the leadership: after a crash of the leader, another scheduler leads within this
            time.
        redis_url: accepted for compatibility with the published package, like `task_registry` (for `registry`), a
            DiracX `config` and other arguments. URL and intervals are ignored: the broker's connection is used.

    Raises:
        TaskConfigError: when a DiracX `config` has wrong settings of tasks.
    """

    def __init__(
        self,
        broker: RedisStreamBroker,
        registry: Mapping[str, type[BaseTask]] | str | None = None,
        *,
        config: TasksConfig | Config | None = None,
        vos: Iterable[str] = (),
        lease_seconds: float = 6.0,
        redis_url: str | None = None,
        task_registry: Mapping[str, type[BaseTask]] | None = None,
        **published: Any,
    ) -> None:
        if isinstance(registry, str):
            registry, redis_url = None, registry
        if published and redis_url is None:
            raise TypeError(f"TaskScheduler does not know {', '.join(published)}")
        self._broker = broker
        classes = registry if task_registry is None else task_registry
        self._registry = TaskRegistry.of(load_task_registry() if classes is None else classes)
        if config is not None and not isinstance(config, TasksConfig):
            vos, config = sorted(config.registry), load_tasks_config(config=config)
        self._config = config or TasksConfig()
        self._vos = list(vos)
        self._leadership = Leadership(broker, lease_seconds)
        self._outage = Outage("schedule", logger)
        self._alarm = asyncio.Event()
        """Set when there may be work before the next due time."""
        self._outdated = True
        """True if the plan is older than the configuration."""
        self._plan_again_at = float("inf")
        self._promote_at = 0.0
        self._earlier = False
        """True if a task was delayed since the last poll that is due before all others."""
        self.clock = ServerClock()
        self._scheduled: dict[str, ScheduledTask] = {}
        self._problems: dict[str, str] = {}
        self._reported: dict[str, str] | None = None
        self._set_up_agenda()
        self.leads = asyncio.Event()
        """Set while this scheduler leads."""
        self.ready = asyncio.Event()
        """Set when this scheduler leads for the first time, or has seen that another one does."""

    def reconfigure(self, config: TasksConfig, vos: Iterable[str]) -> None:
        """Apply other settings and VOs from now on. Call it in the scheduler's event loop.

        Schedules with an unchanged rule keep their next run; removed ones are deleted; failing ones are tried
        again.
        """
        self._config = config
        self._vos = list(vos)
        self._outdated = True
        self._alarm.set()

    async def startup(self) -> None:
        """Check the server, as the broker's `startup` does."""
        await self._broker.startup(Role.SCHEDULER)

    async def shutdown(self) -> None:
        """Do nothing: the broker closes the connections."""

    async def run_forever(self, finish_event: asyncio.Event | None = None) -> None:
        """Call `run`, without an event until cancelled; the published name."""
        await self.run(finish_event or asyncio.Event())

    async def run(self, stop: asyncio.Event) -> None:
        """Schedule until `stop` is set.

        Raises:
            redis.exceptions.RedisError: when the server does not reply at the start. Later, it waits for the
                server.
        """
        await self._broker.startup()
        stopping = asyncio.create_task(stop.wait())
        stopping.add_done_callback(lambda _: self._alarm.set())
        try:
            while not stop.is_set():
                try:
                    if await self._leadership.take() or await self._stand_by(stop):
                        await self._lead(stop)
                except RedisError as error:
                    if not is_transient(error):
                        raise
                    await asyncio.wait({stopping}, timeout=self._outage.failed(reason(error)))
                finally:
                    self.leads.clear()
            await self._leadership.release()
        finally:
            stopping.cancel()

    async def _stand_by(self, stop: asyncio.Event) -> bool:
        """Wait for the leadership. False: `stop` is set."""
        redis = self._broker.redis
        async with listening(redis, scheduling.LEADER_CHANNEL, lambda _: self._alarm.set()) as subscription:
            if subscription is not None:
                subscription.add_done_callback(lambda _: self._alarm.set())
            while not stop.is_set():
                self._alarm.clear()
                if await self._leadership.take():
                    return True
                self._outage.over()
                self.ready.set()
                self._raise_if_ended(subscription)
                await self._sleep(await self._leadership.free_in_seconds(notified=subscription is not None))
        return False

    async def _lead(self, stop: asyncio.Event) -> None:
        logger.info("leading")
        async with listening(self._broker.redis, scheduling.WAKE_CHANNEL, self._receive) as subscription:
            if subscription is not None:
                subscription.add_done_callback(lambda _: self._alarm.set())
            self._promote_at = 0.0
            self._outdated = True
            auditing = asyncio.create_task(audit_periodically(self._broker.redis))
            try:
                await self._schedule(stop, subscription)
            finally:
                await cancel_and_wait(auditing)

    async def _schedule(self, stop: asyncio.Event, subscription: asyncio.Task[None] | None) -> None:
        while not stop.is_set():
            self._alarm.clear()
            self._raise_if_ended(subscription)
            if self._leadership.renewal_due and not await self._renew():
                break
            if self._outdated or self._plan_again_at <= time.monotonic():
                if not await self._plan():
                    break
                self.leads.set()
                self.ready.set()
            if not await self._submit_due():
                break
            await self._promote_due()
            self._outage.over()
            await self._wait_until(min(self._leadership.renew_at, self._promote_at, self._next_at()))
        else:
            return
        logger.warning("lost the lead")

    # --- waiting ----------------------------------------------------------------------------------------

    def _receive(self, message: bytes) -> None:
        if message == b"delayed":
            self._earlier = True
        else:
            self._leadership.renew_at = 0.0  # `_renew` reads the paused schedules
        self._alarm.set()

    def _raise_if_ended(self, subscription: asyncio.Task[None] | None) -> None:
        if subscription is not None and subscription.done():
            subscription.result()

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._alarm.wait()
        except TimeoutError:
            pass

    async def _wait_until(self, moment: float) -> None:
        """Wait until `moment` (monotonic clock), or for an alarm; prepare the next submissions meanwhile."""
        some_left = True
        while not self._alarm.is_set() and (left := moment - time.monotonic()) > 0:
            if some_left and left > _CALM_SECONDS:
                some_left = self._agenda.prepare(_PREPARE_SECONDS)
                await asyncio.sleep(0)
            else:
                await self._sleep(left)

    def _next_at(self) -> float:
        due_ms = self._agenda.first_due_ms
        return float("inf") if due_ms is None else self.clock.monotonic_at(due_ms) + _MARGIN_SECONDS

    # --- the plan ---------------------------------------------------------------------------------------

    async def _renew(self) -> bool:
        """Renew the lease, and requeue deferred and resumed schedules. False: another scheduler leads."""
        if not await self._leadership.renew():
            return False
        self._promote_at = 0.0
        await self._poll_clock()
        self._agenda.requeue()
        if self._agenda.paused:
            self._agenda.resume_except(await scheduling.paused_schedules(self._broker.redis))
        return True

    def _set_up_agenda(self) -> None:
        self._binding = Binding(self._broker, self._registry, self._config)
        self._agenda = Agenda(self._make, self._failed)

    async def _plan(self) -> bool:
        """Write the schedules of code, configuration and VOs to Redis. False: another scheduler leads."""
        redis = self._broker.redis
        self._outdated = False
        self._plan_again_at = float("inf")
        self._problems, self._reported = {}, None
        self._set_up_agenda()
        instances = {}
        for number, found in enumerate(iter_schedules(self._registry, self._config, self._vos)):
            instances[found.id] = found
            if number % _LOOKUP_BATCH == 0:
                await asyncio.sleep(0)
        self._scheduled = {found.id: found for found in instances.values() if found.enabled}
        self._broker.counts.await_occurrences({found.name for found in self._scheduled.values()})
        await self.clock.poll(redis)
        known = await scheduling.fingerprints(redis)
        planned, now = await scheduling.next_runs(redis), datetime.fromtimestamp(self.clock.now_ms() / 1000, UTC)
        latest: dict[str, datetime] = {}
        replanned: list[str] = []
        changed: list[PlanStep] = []
        for scheduled in list(self._scheduled.values()):
            try:
                assert scheduled.rule is not None
                fingerprint = scheduled.rule.fingerprint
                if known.get(scheduled.id.encode()) != fingerprint.encode():
                    first_ms = self._first_run(scheduled)
                    changed.append({"id": scheduled.id, "fingerprint": fingerprint})
                    if first_ms is not None:
                        changed[-1]["due"] = first_ms
                elif (due_ms := scheduled.corrected_ms(planned.get(scheduled.id), now, latest)) is not None:
                    changed.append({"id": scheduled.id, "fingerprint": fingerprint, "due": due_ms})
                    replanned.append(scheduled.id)
            except BaseException as error:  # rules may be those of users
                self._report(scheduled.id, error)
                del self._scheduled[scheduled.id]
                self._plan_again_at = time.monotonic() + _RETRY_SECONDS
            await asyncio.sleep(0)
            if self._leadership.renewal_due and not await self._leadership.renew():
                return False
            await self._promote_due()
        steps = [*changed, *await self._removals(instances)]
        # In batches: should this process end between them, the next leader plans again.
        for first in range(0, max(1, len(steps)), PLAN_BATCH):
            if self._leadership.renewal_due and not await self._leadership.renew():
                return False
            if not await scheduling.plan(redis, self._leadership.token, steps[first : first + PLAN_BATCH]):
                return False
            await self._promote_due()
        self._agenda.load((await scheduling.next_runs(redis)).items())
        await self._publish_problems()
        if replanned:
            shown = ", ".join(replanned[:_SHOWN]) + (", …" if len(replanned) > _SHOWN else "")
            text = (
                "next runs later than the rules say, as after the server's clock was set back: %d planned anew: %s"
            )
            logger.warning(text, len(replanned), shown)
        new = len(changed) - len(replanned)
        logger.info("%d schedules, %d of them new or changed", len(self._scheduled), new)
        return True

    async def _removals(self, instances: Collection[str]) -> list[PlanStep]:
        """Make the changes of lua/plan.lua for schedules that are disabled or no longer exist."""
        stored = await scheduling.stored_schedules(self._broker.redis)
        stored -= {schedule.encode() for schedule in self._scheduled}
        disabled = {schedule.encode() for schedule in instances}
        return [
            {"id": schedule} if schedule in disabled else {"id": schedule, "forgotten": 1} for schedule in stored
        ]

    async def _poll_clock(self) -> None:
        """Poll the server's clock. When it was set back, the next runs are planned again."""
        if await self.clock.poll(self._broker.redis):
            self._outdated = True

    def _first_run(self, scheduled: ScheduledTask) -> int | None:
        """Return the first run of a new rule (ms); None when it has ended."""
        assert scheduled.rule is not None
        try:
            return in_ms(scheduled.rule.next_after(datetime.fromtimestamp(self.clock.now_ms() / 1000, UTC)))
        except ValueError:
            logger.error("%s has no run left: its rule has come to its end", scheduled.id)
            return None

    # --- submission -------------------------------------------------------------------------------------

    async def _promote_due(self) -> None:
        """Promote a batch of delayed tasks, or poll locks with waiting tasks, if due; set the next due time."""
        now = time.monotonic()
        if self._promote_at > now and not self._earlier:
            return
        self._earlier = False  # before the call, whose reply may lack tasks delayed from now on
        more, next_due = await self._broker.promote_batch()
        if more:
            self._promote_at = 0.0
        elif next_due is None:
            self._promote_at = float("inf")
        else:
            self._promote_at = max(now, self.clock.monotonic_at(next_due) + _MARGIN_SECONDS)

    def _make(self, schedule: str, due_ms: int) -> Occurrence:
        scheduled = self._scheduled[schedule]
        occurrence = scheduled.occurrence(self._binding, due_ms)
        if scheduled.deterministic:
            scheduled.set_next(occurrence, due_ms)
        return occurrence

    def _update_prepared(self, occurrence: Occurrence, now_ms: float) -> bool:
        """Update a prepared submission. False: the schedule's rule fails."""
        schedule, due_ms = occurrence["id"], occurrence["due"]
        scheduled = self._scheduled[schedule]
        if scheduled.missed == "skip" and now_ms - due_ms > MISSED_SECONDS * 1000:
            logger.info("%s: a missed occurrence is skipped", schedule)
            del occurrence["stream"], occurrence["task"], occurrence["data"]
        if scheduled.deterministic and occurrence.get("next", float("inf")) > now_ms:
            return True
        try:
            scheduled.set_next(occurrence, now_ms)
        except BaseException as error:
            self._failed(schedule, error)
            return False
        return True

    async def _submit_due(self) -> bool:
        """Submit due occurrences in batches, preparing one while another is sent. False: another one leads.

        Those that become due meanwhile are left to the next call: with schedules that are too frequent for the
        server, there is no end of them.
        """
        sent: _Sent | None = None
        begin_ms = self.clock.now_ms()
        try:
            while (batch := self._take_batch(begin_ms)) or sent is not None:
                earlier, sent = sent, self._send(batch) if batch else None
                if earlier is not None and not await self._handle_replies(earlier):
                    return False
                if self._leadership.renewal_due and not await self._renew():
                    return False
        finally:
            if sent is not None:
                await cancel_and_wait(sent.replies)
        await self._publish_problems()
        return True

    def _take_batch(self, until_ms: float) -> list[Occurrence]:
        now_ms = self.clock.now_ms()
        # The clock may have been set back meanwhile: those that are too early are due later.
        taken = self._agenda.take_due(min(until_ms, now_ms), OCCUR_BATCH, _PREPARE_LATE_SECONDS)
        return [occurrence for occurrence in taken if self._update_prepared(occurrence, now_ms)]

    def _send(self, batch: list[Occurrence]) -> _Sent:
        call = scheduling.occur(self._broker.redis, self._leadership.token, batch)
        return _Sent(batch, asyncio.create_task(call))

    async def _handle_replies(self, sent: _Sent) -> bool:
        replies = await sent.replies
        if replies is None:
            return False
        for occurrence, reply in zip(sent.batch, replies, strict=True):
            await self._handle_reply(occurrence, reply)
        if _TOO_EARLY in replies:
            await self._poll_clock()
        return True

    async def _handle_reply(self, occurrence: Occurrence, reply: int) -> None:
        """Set the next due time of a schedule, from the server's reply to its occurrence."""
        schedule, due_ms = occurrence["id"], occurrence["due"]
        following: int | None
        if reply == _SUBMITTED:
            self._count(schedule, occurrence["stream"])
        if reply == _TOO_EARLY:
            following = due_ms
        elif reply == _PAUSED:
            return self._agenda.pause(schedule)
        elif reply == _REFUSED:
            return self._defer(schedule, f"the server refuses to add it to {occurrence['stream']}")
        elif reply == _NOT_DUE:  # another process has changed it
            following = await scheduling.next_run(self._broker.redis, schedule)
        else:
            self._problems.pop(schedule, None)
            following = occurrence.get("next")
            if following is None:
                logger.info("%s has had its last run", schedule)
        if following is None:
            self._agenda.forget(schedule)
        else:
            self._agenda.note(schedule, following)

    def _count(self, schedule: str, stream: str | None) -> None:
        """Count a submitted occurrence, or (`stream` is None) one that could not be submitted."""
        counts, scheduled = self._broker.counts, self._scheduled.get(schedule)
        if scheduled is None:  # the plan has changed meanwhile
            return
        counts.note_occurrence(scheduled.name, stream is not None)
        if stream is not None:
            counts.note_one(scheduled.name, stream)

    # --- problems ---------------------------------------------------------------------------------------

    def _failed(self, schedule: str, error: BaseException) -> None:
        self._count(schedule, None)
        self._report(schedule, error)
        self._agenda.defer(schedule, _RETRY_SECONDS)

    def _report(self, schedule: str, error: BaseException) -> None:
        traceback = describe_exception(error)["traceback"]
        logger.error("%s cannot be submitted; trying again in %g s\n%s", schedule, _RETRY_SECONDS, traceback)
        self._problems[schedule] = one_line(error)[:_LONGEST_PROBLEM]

    def _defer(self, schedule: str, problem: str) -> None:
        self._count(schedule, None)
        logger.error("%s cannot be submitted: %s; trying again in %g s", schedule, problem, _RETRY_SECONDS)
        self._problems[schedule] = problem
        self._agenda.defer(schedule, _RETRY_SECONDS)

    async def _publish_problems(self) -> None:
        """Publish the schedules that cannot be submitted."""
        if self._problems == self._reported:
            return
        await scheduling.publish_problems(self._broker.redis, self._problems)
        self._reported = dict(self._problems)
