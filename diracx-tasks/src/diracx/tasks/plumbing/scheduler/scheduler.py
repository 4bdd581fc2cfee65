"""The scheduler: submits periodic tasks when they are due, promotes delayed ones. One leads, others stand by."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from .._util.retrying import Backoff, is_transient
from .._util.tasks import cancel_and_wait
from ..broker import scheduling
from ..broker.group_audit import audit_for_ever
from ..broker.listening import listening
from ..broker.models import in_ms
from ..broker.server_check import Role
from ..config import TasksConfig, load_tasks_config
from ..registry import TaskRegistry, load_task_registry
from ..submission.client import Binding
from .agenda import Agenda
from .clock import SET_BACK_SECONDS, ServerClock
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
#: Schedules that one script call brings up to date: 1 ms of the server's time.
PLAN_BATCH = 250
#: A portion of preparing what comes next; so long may something else have to wait.
_PORTION_SECONDS = 0.003
#: So long before something is due nothing is begun any more that could make it late.
_CALM_SECONDS = 0.02
#: Preparing late occurrences, which nobody could prepare before, goes on for so long before some are submitted.
_LATE_PORTION_SECONDS = 0.02
#: How long a schedule that cannot be submitted is left alone.
_RETRY_SECONDS = 60.0
#: A timer that fires this much after the moment never asks too early.
_MARGIN_SECONDS = 0.0003
_LONGEST_PROBLEM = 500
#: Schedules that are named in one line.
_SHOWN = 5
#: Instances that are looked up in the configuration between two looks at the rest of the world.
_SMALL_PORTION = 20

#: Replies of lua/occur.lua that mean that its schedule is still, or no more, as we believed.
_NOT_DUE, _SUBMITTED, _TOO_EARLY, _PAUSED, _REFUSED = 0, 1, 3, 4, 6


@dataclass(frozen=True)
class _Sent:
    """Batch of occurrences that was sent to the server."""

    batch: list[Occurrence]
    answer: asyncio.Task[list[int] | None]


class TaskScheduler:
    """Submits periodic and delayed tasks that are due. Any number may run; one leads at a time.

    Args:
        vos: the VOs of which each VO-aware task has an instance.
        lease_seconds: how long a dead leader keeps the others waiting, at most.
        redis_url: of the published package, as are `task_registry` (`registry`), a DiracX `config` and whatever
            else it takes: the broker's connection is used, and there are no intervals to set.

    Raises:
        TaskConfigError: when a DiracX `config` is given whose settings of tasks are wrong.
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
        self._pauses = Backoff()
        self._in_trouble = False
        self._alarm = asyncio.Event()
        """Set when something may have to be done before the next due time."""
        self._outdated = True
        """True if the plan is older than the configuration."""
        self._plan_again_at = float("inf")
        self._promote_at = 0.0
        self._earlier = False
        """True if something was delayed since the last look that is due before all the rest."""
        self._clock = ServerClock()
        self._scheduled: dict[str, ScheduledTask] = {}
        self._problems: dict[str, str] = {}
        self._reported: dict[str, str] | None = None
        self._set_up_agenda()
        self.leads = asyncio.Event()
        """Set while this scheduler leads."""
        self.ready = asyncio.Event()
        """Set when it leads for the first time, or knows that another does."""

    def reconfigure(self, config: TasksConfig, vos: Iterable[str]) -> None:
        """Apply these settings and VOs from now on. To be called in the scheduler's event loop.

        What has the same rule as before keeps its next run; what is gone is forgotten; what could not be
        submitted is tried again.
        """
        self._config = config
        self._vos = list(vos)
        self._outdated = True
        self._alarm.set()

    async def startup(self) -> None:
        """Check the server, as the broker's `startup` does."""
        await self._broker.startup(Role.SCHEDULER)

    async def shutdown(self) -> None:
        """Do nothing: connections are the broker's."""

    async def run_forever(self, finish_event: asyncio.Event | None = None) -> None:
        """`run` under its published name; without an event until it is cancelled."""
        await self.run(finish_event or asyncio.Event())

    async def run(self, stop: asyncio.Event) -> None:
        """Schedule until `stop` is set.

        Raises:
            redis.exceptions.RedisError: when the server does not answer at the start. Later it is waited for.
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
                    if not self._in_trouble:
                        logger.warning("cannot schedule: %s; trying again until it works", error)
                    self._in_trouble = True
                    await asyncio.wait({stopping}, timeout=self._pauses.next())
                finally:
                    self.leads.clear()
            await self._leadership.release()
        finally:
            stopping.cancel()

    def _works(self) -> None:
        if self._in_trouble:
            logger.warning("can schedule again")
        self._in_trouble = False
        self._pauses.succeeded()

    async def _stand_by(self, stop: asyncio.Event) -> bool:
        """Wait for the leadership. False: stop."""
        redis = self._broker.redis
        async with listening(redis, scheduling.LEADER_CHANNEL, lambda _: self._alarm.set()) as hearing:
            if hearing is not None:
                hearing.add_done_callback(lambda _: self._alarm.set())
            while not stop.is_set():
                self._alarm.clear()
                if await self._leadership.take():
                    return True
                self._works()
                self.ready.set()
                self._check(hearing)
                await self._sleep(await self._leadership.free_in_seconds(heard=hearing is not None))
        return False

    async def _lead(self, stop: asyncio.Event) -> None:
        logger.info("leading")
        async with listening(self._broker.redis, scheduling.WAKE_CHANNEL, self._hear) as hearing:
            if hearing is not None:
                hearing.add_done_callback(lambda _: self._alarm.set())
            self._promote_at = 0.0
            self._outdated = True
            auditing = asyncio.create_task(audit_for_ever(self._broker.redis))
            try:
                await self._schedule(stop, hearing)
            finally:
                await cancel_and_wait(auditing)

    async def _schedule(self, stop: asyncio.Event, hearing: asyncio.Task[None] | None) -> None:
        while not stop.is_set():
            self._alarm.clear()
            self._check(hearing)
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
            self._works()
            await self._until(min(self._leadership.renew_at, self._promote_at, self._next_at()))
        else:
            return
        logger.warning("lost the lead")

    # --- waiting ----------------------------------------------------------------------------------------

    def _hear(self, message: bytes) -> None:
        if message == b"delayed":
            self._earlier = True
        else:
            self._leadership.renew_at = 0.0  # which looks at what is paused
        self._alarm.set()

    def _check(self, hearing: asyncio.Task[None] | None) -> None:
        if hearing is not None and hearing.done():
            hearing.result()

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._alarm.wait()
        except TimeoutError:
            pass

    async def _until(self, moment: float) -> None:
        """Wait until then (monotonic clock), or for an alarm; prepare meanwhile what is due next."""
        some_left = True
        while not self._alarm.is_set() and (left := moment - time.monotonic()) > 0:
            if some_left and left > _CALM_SECONDS:
                some_left = self._agenda.prepare(_PORTION_SECONDS)
                await asyncio.sleep(0)
            else:
                await self._sleep(left)

    def _next_at(self) -> float:
        due_ms = self._agenda.first_due_ms
        return float("inf") if due_ms is None else self._clock.monotonic_at(due_ms) + _MARGIN_SECONDS

    # --- the plan ---------------------------------------------------------------------------------------

    async def _renew(self) -> bool:
        """Renew the lease, and requeue what could not be submitted. False: another scheduler leads."""
        if not await self._leadership.renew():
            return False
        self._promote_at = 0.0
        await self._ask_clock()
        self._agenda.requeue()
        if self._agenda.has_paused:
            self._agenda.go_on(await scheduling.paused_schedules(self._broker.redis))
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
            if number % _SMALL_PORTION == 0:
                await asyncio.sleep(0)
        self._scheduled = {found.id: found for found in instances.values() if found.enabled}
        self._broker.counts.await_occurrences({found.name for found in self._scheduled.values()})
        await self._clock.ask(redis)
        known = await scheduling.fingerprints(redis)
        planned, now = await scheduling.next_runs(redis), datetime.fromtimestamp(self._clock.now_ms() / 1000, UTC)
        latest: dict[str, datetime] = {}
        brought_back: list[str] = []
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
                elif (due_ms := self._brought_back(scheduled, planned.get(scheduled.id), now, latest)) is not None:
                    changed.append({"id": scheduled.id, "fingerprint": fingerprint, "due": due_ms})
                    brought_back.append(scheduled.id)
            except Exception as error:
                self._report(scheduled.id, error)
                del self._scheduled[scheduled.id]
                self._plan_again_at = time.monotonic() + _RETRY_SECONDS
            await asyncio.sleep(0)
            if self._leadership.renewal_due and not await self._leadership.renew():
                return False
            await self._promote_due()
        steps = [*changed, *await self._no_more_scheduled(instances)]
        # In parts: should we end between them, the next leader plans anew.
        for first in range(0, max(1, len(steps)), PLAN_BATCH):
            if self._leadership.renewal_due and not await self._leadership.renew():
                return False
            if not await scheduling.plan(redis, self._leadership.token, steps[first : first + PLAN_BATCH]):
                return False
            await self._promote_due()
        self._agenda.load((await scheduling.next_runs(redis)).items())
        await self._tell_problems()
        if brought_back:
            shown = ", ".join(brought_back[:_SHOWN]) + (", …" if len(brought_back) > _SHOWN else "")
            text = (
                "next runs later than the rules say, as after the server's clock was set back: %d planned anew: %s"
            )
            logger.warning(text, len(brought_back), shown)
        new = len(changed) - len(brought_back)
        logger.info("%d schedules, %d of them new or changed", len(self._scheduled), new)
        return True

    async def _no_more_scheduled(self, instances: Collection[str]) -> list[PlanStep]:
        """Make the changes of lua/plan.lua for schedules that are disabled or exist no more."""
        stored = await scheduling.stored_schedules(self._broker.redis)
        stored -= {schedule.encode() for schedule in self._scheduled}
        there = {schedule.encode() for schedule in instances}
        return [{"id": schedule} if schedule in there else {"id": schedule, "forgotten": 1} for schedule in stored]

    def _brought_back(
        self, scheduled: ScheduledTask, due_ms: int | None, now: datetime, latest: dict[str, datetime]
    ) -> int | None:
        """Return when a schedule is due (ms) whose next run, or end, is later than its rule says; None: it is not.

        Args:
            latest: by fingerprint, the latest next run that a rule may have now. Many schedules share a rule.
        """
        assert scheduled.rule is not None
        key = scheduled.rule.fingerprint
        try:
            if key not in latest:
                # Runs that are due soon may be those that the planned one follows.
                latest[key] = scheduled.rule.next_after(now + timedelta(seconds=SET_BACK_SECONDS))
            if due_ms is None:
                return in_ms(latest[key]) if scheduled.deterministic else None
            if due_ms <= max(in_ms(latest[key]), in_ms(now)):
                return None
            run = scheduled.brought_back(datetime.fromtimestamp(due_ms / 1000, UTC), now)
        except Exception:
            return None  # it is at its end, or fails: which is reported when it is due
        return None if run is None else in_ms(run)

    async def _ask_clock(self) -> None:
        """Poll the server's clock. When it was set back, the next runs are planned again."""
        if await self._clock.ask(self._broker.redis):
            self._outdated = True

    def _first_run(self, scheduled: ScheduledTask) -> int | None:
        run = scheduled.first_run_after(datetime.fromtimestamp(self._clock.now_ms() / 1000, UTC))
        if run is None:
            logger.error("%s has no run left: its rule has come to its end", scheduled.id)
            return None
        return in_ms(run)

    # --- what is due ------------------------------------------------------------------------------------

    async def _promote_due(self) -> None:
        """Promote a batch of delayed tasks or poll lines of locks if some are due; note when the next is."""
        asked = time.monotonic()
        if self._promote_at > asked and not self._earlier:
            return
        self._earlier = False  # what is heard from now on, the answer may not know of
        more, next_due = await self._broker.promote_batch()
        if more:
            self._promote_at = 0.0
        elif next_due is None:
            self._promote_at = float("inf")
        else:
            self._promote_at = max(asked, self._clock.monotonic_at(next_due) + _MARGIN_SECONDS)

    def _make(self, schedule: str, due_ms: int) -> Occurrence:
        scheduled = self._scheduled[schedule]
        occurrence = scheduled.occurrence(self._binding, due_ms)
        if scheduled.deterministic:
            scheduled.set_next(occurrence, due_ms)
        return occurrence

    def _made_now(self, occurrence: Occurrence, now_ms: float) -> bool:
        """Update a prepared submission. False: the schedule's rule fails."""
        schedule, due_ms = occurrence["id"], occurrence["due"]
        scheduled = self._scheduled[schedule]
        if scheduled.missed == "skip" and now_ms - due_ms > MISSED_SECONDS * 1000:
            logger.info("%s: what was missed is left out", schedule)
            del occurrence["stream"], occurrence["task"], occurrence["data"]
        if scheduled.deterministic and occurrence.get("next", float("inf")) > now_ms:
            return True
        try:
            scheduled.set_next(occurrence, now_ms)
        except Exception as error:
            self._failed(schedule, error)
            return False
        return True

    async def _submit_due(self) -> bool:
        """Submit what is due in batches; each is made during the one before. False: another scheduler leads."""
        sent: _Sent | None = None
        try:
            while (batch := self._take_batch()) or sent is not None:
                earlier, sent = sent, self._send(batch) if batch else None
                if earlier is not None and not await self._answered(earlier):
                    return False
                if self._leadership.renewal_due and not await self._renew():
                    return False
        finally:
            if sent is not None:
                await cancel_and_wait(sent.answer)
        await self._tell_problems()
        return True

    def _take_batch(self) -> list[Occurrence]:
        now_ms = self._clock.now_ms()
        taken = self._agenda.take_due(now_ms, OCCUR_BATCH, _LATE_PORTION_SECONDS)
        return [occurrence for occurrence in taken if self._made_now(occurrence, now_ms)]

    def _send(self, batch: list[Occurrence]) -> _Sent:
        asking = scheduling.occur(self._broker.redis, self._leadership.token, batch)
        return _Sent(batch, asyncio.create_task(asking))

    async def _answered(self, sent: _Sent) -> bool:
        replies = await sent.answer
        if replies is None:
            return False
        for occurrence, reply in zip(sent.batch, replies, strict=True):
            await self._follow(occurrence, reply)
        if _TOO_EARLY in replies:
            await self._ask_clock()
        return True

    async def _follow(self, occurrence: Occurrence, reply: int) -> None:
        """Note when a schedule is due next, by what the server has made of its occurrence."""
        schedule, due_ms = occurrence["id"], occurrence["due"]
        following: int | None
        if reply == _SUBMITTED:
            self._note(schedule, occurrence["stream"])
        if reply == _TOO_EARLY:
            following = due_ms
        elif reply == _PAUSED:
            return self._agenda.pause(schedule)
        elif reply == _REFUSED:
            return self._defer(schedule, f"the server does not let it into {occurrence['stream']}")
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

    def _note(self, schedule: str, stream: str | None) -> None:
        """Count a run that was submitted, or (None) could not be."""
        counts, scheduled = self._broker.counts, self._scheduled.get(schedule)
        if scheduled is None:  # the plan has changed meanwhile
            return
        counts.note_occurrence(scheduled.name, stream is not None)
        if stream is not None:
            counts.note_one(scheduled.name, stream)

    # --- what cannot be submitted -----------------------------------------------------------------------

    def _failed(self, schedule: str, error: Exception) -> None:
        self._note(schedule, None)
        self._report(schedule, error)
        self._agenda.defer(schedule, _RETRY_SECONDS)

    def _report(self, schedule: str, error: Exception) -> None:
        logger.error("%s cannot be submitted; trying again in %g s", schedule, _RETRY_SECONDS, exc_info=error)
        self._problems[schedule] = f"{type(error).__name__}: {error}"[:_LONGEST_PROBLEM]

    def _defer(self, schedule: str, problem: str) -> None:
        self._note(schedule, None)
        logger.error("%s cannot be submitted: %s; trying again in %g s", schedule, problem, _RETRY_SECONDS)
        self._problems[schedule] = problem
        self._agenda.defer(schedule, _RETRY_SECONDS)

    async def _tell_problems(self) -> None:
        """Publish the schedules that cannot be submitted."""
        if self._problems == self._reported:
            return
        await scheduling.publish_problems(self._broker.redis, self._problems)
        self._reported = dict(self._problems)
