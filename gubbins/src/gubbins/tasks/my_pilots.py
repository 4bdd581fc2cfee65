"""Tasks of the pilot system: submit, check and prune pilots, collect their output, import downtimes.

No task opens a transaction for its whole execution, since compute elements are slow; the logic layer uses short
ones.
"""

from __future__ import annotations

__all__ = [
    "MyCheckPilotsTask",
    "MyCollectOutputsTask",
    "MyImportDowntimesTask",
    "MyPilotReportTask",
    "MyPilotTask",
    "MyPrunePilotsTask",
    "MySubmitPilotsTask",
]

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, ClassVar

from diracx.tasks.plumbing.base_task import (
    BaseTask,
    PeriodicBaseTask,
    PeriodicVoAwareBaseTask,
    current_message,
    schedule_many,
)
from diracx.tasks.plumbing.enums import Size
from diracx.tasks.plumbing.lazy import lazy_names
from diracx.tasks.plumbing.locks import BaseLock, MutexLock
from diracx.tasks.plumbing.retry_policies import NoRetry, RetryPolicyBase
from diracx.tasks.plumbing.schedules import CronSchedule, IntervalSeconds, TaskScheduleBase

from gubbins.domain.exceptions import (
    CEDisabledError,
    CEPausedError,
    CEQuotaError,
    NoRoomError,
    SubmissionLimitError,
)
from gubbins.domain.pilot_states import ACTIVE, MyPilotStatus

from .my_pilot_lock_types import MY_PILOT

#: Label of tasks spawned by `MySubmitPilotsTask`: the stamp of the requested pilot.
LABEL_REQUESTED = "pilot_requested"

# Imported lazily: every worker and scheduler imports this module, and few use the pilot database.
if TYPE_CHECKING:
    from diracx.tasks.plumbing.depends import Config

    from .injected import PilotDB, PilotRegistry, ResourceStatus, TaskQueues, WaitingJobs
else:
    __getattr__ = lazy_names(
        __name__,
        {
            ".injected": ["PilotDB", "PilotRegistry", "ResourceStatus", "TaskQueues", "WaitingJobs"],
            "diracx.tasks.plumbing.depends": ["Config"],
        },
    )

logger = logging.getLogger(__name__)


@dataclass
class MyPilotTask(BaseTask):
    """Submits one pilot of a VO to a compute element, in one call with the other pending requests.

    Neither retried nor dead-lettered: the next round of `MySubmitPilotsTask` requests pilots again.
    """

    ce_name: str
    vo: str

    size: ClassVar[Size] = Size.SMALL
    retry_policy: ClassVar[RetryPolicyBase] = NoRetry()
    dlq_eligible: ClassVar[bool] = False

    @property
    def execution_locks(self) -> list[BaseLock]:
        """One submission at a time to each compute element."""
        return [MutexLock(MY_PILOT, self.ce_name)]

    async def execute(self, my_pilot_db: PilotDB, **kwargs: Any) -> int | None:
        """Return the pilot's id; None: no slot, a rule, a disabled or paused compute element, an expired request.

        Raises:
            PilotSubmissionError: the compute element refused the pilot, does not exist, or does not serve the VO.
        """
        from gubbins.logic import my_pilots as logic

        try:
            message = current_message.get()
            if message is None:
                return await logic.submit_pilot(my_pilot_db, self.ce_name, self.vo)
            # The stamp prevents a second pilot if the task is executed again after a crash.
            if (requested := message.labels.get(LABEL_REQUESTED)) is not None:
                return await logic.submit_requested_pilot(my_pilot_db, self.ce_name, self.vo, stamp=requested)
            stamp = hashlib.blake2b(message.task_id.encode(), digest_size=16).hexdigest()
            return await logic.submit_pilot(my_pilot_db, self.ce_name, self.vo, stamp=stamp)
        except (NoRoomError, SubmissionLimitError, CEDisabledError, CEPausedError, CEQuotaError) as error:
            logger.info("No pilot for %s: %s", self.vo, error)
            return None


@dataclass
class MySubmitPilotsTask(PeriodicVoAwareBaseTask):
    """Spawns a `MyPilotTask` for each pilot that the VO may submit, by free slots and rules of compute elements.

    The configuration may define several instances, each for some compute elements and with its own schedule.

    Raises:
        ValueError: both `compute_elements` and `all_but` are given.
    """

    vo: str
    compute_elements: list[str] | None = field(default=None, kw_only=True)
    """Submit to these only; None: to all."""
    all_but: list[str] | None = field(default=None, kw_only=True)
    """Exclude these."""

    default_schedule: ClassVar[TaskScheduleBase] = IntervalSeconds(60)

    def __post_init__(self) -> None:
        if self.compute_elements is not None and self.all_but is not None:
            raise ValueError("compute_elements and all_but exclude each other: give one of them")

    def serialize(self) -> tuple[Any, ...]:
        """Serialize the VO only, as the published task, unless compute elements are given."""
        values = super().serialize()
        return values if any(value is not None for value in values[1:]) else values[:1]

    async def execute(
        self,
        my_pilot_db: PilotDB,
        config: Config = None,  # type: ignore[assignment]  # injected where there is one
        job_db: WaitingJobs = None,  # type: ignore[assignment]  # likewise
        task_queue_db: TaskQueues = None,  # type: ignore[assignment]  # likewise
        **kwargs: Any,
    ) -> dict[str, int]:
        """Return the number of spawned tasks by compute element.

        All VOs of the DiracX configuration share the compute elements. Waiting jobs are read from the database of
        task queues, or else counted in the job database.
        """
        from gubbins.logic import my_pilots as logic

        vos = [self.vo] if config is None else list(config.registry)
        requests = await logic.request_pilots(
            my_pilot_db,
            self.vo,
            vos=vos,
            compute_elements=self.compute_elements,
            all_but=self.all_but or (),
            waiting_jobs=lambda: (
                logic.count_waiting_jobs(job_db, self.vo)
                if task_queue_db is None
                else logic.read_task_queues(task_queue_db, self.vo)
            ),
        )
        try:
            await spawn_pilots(self.vo, requests)
        except BaseException:
            # A task that was spawned nevertheless submits nothing without its request.
            for ce_name, stamps in requests.items():
                await logic.withdraw_requests(my_pilot_db, ce_name, stamps)
            raise
        return {ce_name: len(stamps) for ce_name, stamps in requests.items()}


async def spawn_pilots(vo: str, requests: Mapping[str, Sequence[str]]) -> None:
    """Submit a `MyPilotTask` for each request {compute element: stamps}, alternating compute elements."""
    rows = zip_longest(*([(ce_name, stamp) for stamp in stamps] for ce_name, stamps in requests.items()))
    each = [request for row in rows for request in row if request is not None]
    tasks = [MyPilotTask(ce_name, vo) for ce_name, _ in each]
    await schedule_many(tasks, labels=[{LABEL_REQUESTED: stamp} for _, stamp in each])


@dataclass
class MyCheckPilotsTask(PeriodicVoAwareBaseTask):
    """Updates the states of the VO's pilots, one step each, and DiracX's pilot registry, if configured."""

    vo: str

    default_schedule: ClassVar[TaskScheduleBase] = IntervalSeconds(30)

    async def execute(
        self,
        my_pilot_db: PilotDB,
        pilot_registry: PilotRegistry = None,  # type: ignore[assignment]  # injected where there is one
        **kwargs: Any,
    ) -> dict[str, int]:
        """Return the number of pilots that entered each state."""
        from gubbins.logic import my_pilots as logic

        counts = await logic.transition_pilot_states(my_pilot_db, self.vo)
        if pilot_registry is not None:
            await logic.update_registry(my_pilot_db, pilot_registry, self.vo)
        return {str(status): count for status, count in counts.items()}


@dataclass
class MyCollectOutputsTask(PeriodicVoAwareBaseTask):
    """Collects the output of the VO's ended pilots, and writes it to DiracX's pilot registry if rules say so."""

    vo: str

    default_schedule: ClassVar[TaskScheduleBase] = IntervalSeconds(60)

    async def execute(
        self,
        my_pilot_db: PilotDB,
        pilot_registry: PilotRegistry = None,  # type: ignore[assignment]  # injected where there is one
        **kwargs: Any,
    ) -> int:
        """Return the number of pilots."""
        from gubbins.logic import my_pilots as logic

        collected = await logic.collect_outputs(my_pilot_db, self.vo)
        if pilot_registry is not None:
            await logic.write_registry_outputs(my_pilot_db, pilot_registry, self.vo)
        return collected


@dataclass
class MyImportDowntimesTask(PeriodicBaseTask):
    """Imports downtimes from DiracX's resource status, if configured."""

    default_schedule: ClassVar[TaskScheduleBase] = IntervalSeconds(300)

    async def execute(
        self,
        my_pilot_db: PilotDB,
        resource_status_db: ResourceStatus = None,  # type: ignore[assignment]  # injected where there is one
        **kwargs: Any,
    ) -> dict[str, str]:
        """Return the reasons of compute elements that are down.

        Raises:
            DowntimeError: the resource status cannot be read.
        """
        from gubbins.logic import my_pilots as logic

        return {} if resource_status_db is None else await logic.import_downtimes(my_pilot_db, resource_status_db)


@dataclass
class MyPilotReportTask(PeriodicBaseTask):
    """Logs the number of pilots in each state, by VO and compute element.

    Submits a check of the pilots of each VO that is not in the configuration any more, and collects their output:
    else they would keep their slots, and their files at the sites, for ever.
    """

    default_schedule: ClassVar[TaskScheduleBase] = CronSchedule("0 * * * *")

    async def execute(
        self,
        my_pilot_db: PilotDB,
        config: Config = None,  # type: ignore[assignment]  # injected where there is one
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return {VO: {compute element: {state: number}}}."""
        from gubbins.logic import my_pilots as logic

        summary = await logic.count_pilots(my_pilot_db)
        totals: Counter[str] = Counter()
        for vo, ces in sorted(summary.items()):
            for ce_name, states in sorted(ces.items()):
                logger.info("Pilots of %s at %s: %s", vo, ce_name, _format_counts(states))
                totals.update(states)
            if config is None or vo in config.registry:
                continue
            if active := sum(states.get(status, 0) for states in ces.values() for status in ACTIVE):
                logger.warning("%d pilots of %s are active, which is not in the configuration", active, vo)
                await MyCheckPilotsTask(vo).schedule()
            await MyCollectOutputsTask(vo).schedule()
        logger.info("Pilots in all: %s", _format_counts(totals))
        return summary


@dataclass
class MyPrunePilotsTask(PeriodicBaseTask):
    """Deletes pilots of all VOs some time after their end, with their history, oldest first, in small batches.

    Raises:
        ValueError: a number is out of range.
    """

    keep_days: float = field(default=30.0, kw_only=True)
    """Retention time after the end of a pilot, > 0."""
    batch: int = field(default=1_000, kw_only=True)
    """Pilots in one transaction, 1-10,000."""
    at_most: int = field(default=100_000, kw_only=True)
    """Pilots in one run."""

    default_schedule: ClassVar[TaskScheduleBase] = CronSchedule("41 * * * *")

    def __post_init__(self) -> None:
        if not 0 < self.keep_days <= 36_500:
            raise ValueError(f"keep_days must be more than 0, and 36,500 at most, not {self.keep_days}")
        if not 1 <= self.batch <= 10_000:
            raise ValueError(f"batch must be between 1 and 10,000, not {self.batch}")
        if self.at_most < 1:
            raise ValueError(f"at_most must be 1 or more, not {self.at_most}")

    async def execute(self, my_pilot_db: PilotDB, **kwargs: Any) -> int:
        """Return the number of deleted pilots."""
        from gubbins.logic import my_pilots as logic

        keep = timedelta(days=self.keep_days)
        deleted = await logic.prune_pilots(my_pilot_db, keep=keep, batch=self.batch, at_most=self.at_most)
        if deleted:
            logger.info("Deleted %d pilots that ended more than %g days ago", deleted, self.keep_days)
        return deleted


def _format_counts(states: dict[str, int]) -> str:
    return ", ".join(f"{states[s]} {s}" for s in MyPilotStatus if states.get(s)) or "none"
