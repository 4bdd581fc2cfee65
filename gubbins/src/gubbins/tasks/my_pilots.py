"""Keep compute elements full of pilots, and follow each pilot to its end (seed `000`).

No task here opens a transaction around its whole execution: compute elements are slow, and the logic layer
uses short ones.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, ClassVar

from diracx.tasks.plumbing._util.lazy import lazy_names
from diracx.tasks.plumbing.base_task import (
    BaseTask,
    PeriodicBaseTask,
    PeriodicVoAwareBaseTask,
    current_message,
    schedule_many,
)
from diracx.tasks.plumbing.enums import Size
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
from gubbins.domain.pilot_states import MyPilotStatus

from .my_pilot_lock_types import MY_PILOT

#: Label of tasks that a round has requested, as against those submitted by hand: the stamp of the pilot.
LABEL_REQUESTED = "pilot_requested"

# Every worker and scheduler imports this module, and few of them ever open the database of the pilots.
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
    """Submits one pilot of a VO to a compute element; in one call with those of the tasks that wait behind it.

    Not retried and not kept when it fails: the next round of `MySubmitPilotsTask` looks again.
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
        """Return the pilot's id; None when there is nothing to submit any more.

        The slot was taken, a rule of the compute element is against it, or it was closed or paused meanwhile; or
        the request of the round has expired, and later rounds have requested all that is wanted.

        Raises:
            PilotSubmissionError: the compute element refused the pilot, is gone, or does not serve the VO.
        """
        from gubbins.logic import my_pilots as logic

        try:
            message = current_message.get()
            if message is None:
                return await logic.submit_pilot(my_pilot_db, self.ce_name, self.vo)
            # A task may be executed again, when its worker died: by its stamp, that is no second pilot.
            if (requested := message.labels.get(LABEL_REQUESTED)) is not None:
                stamp = requested if isinstance(requested, str) else None
                return await logic.submit_requested_pilot(my_pilot_db, self.ce_name, self.vo, stamp=stamp)
            stamp = hashlib.blake2b(message.task_id.encode(), digest_size=16).hexdigest()
            return await logic.submit_pilot(my_pilot_db, self.ce_name, self.vo, stamp=stamp)
        except (NoRoomError, SubmissionLimitError, CEDisabledError, CEPausedError, CEQuotaError) as error:
            logger.info("No pilot for %s: %s", self.vo, error)
            return None


@dataclass
class MySubmitPilotsTask(PeriodicVoAwareBaseTask):
    """Spawns one `MyPilotTask` for each slot that the VO may fill and, by the compute element's rules, wants.

    Configuration may have several instances of it, each for some compute elements and with its own schedule.

    Raises:
        ValueError: when both `compute_elements` and `all_but` are given.
    """

    vo: str
    compute_elements: list[str] | None = field(default=None, kw_only=True)
    """Names of the only ones to submit to; None: all."""
    all_but: list[str] | None = field(default=None, kw_only=True)
    """Names of those not to submit to."""

    default_schedule: ClassVar[TaskScheduleBase] = IntervalSeconds(60)

    def __post_init__(self) -> None:
        if self.compute_elements is not None and self.all_but is not None:
            raise ValueError("compute_elements and all_but exclude each other: give one of them")

    def serialize(self) -> tuple[Any, ...]:
        """Return the VO alone, as the published task does, unless compute elements are named."""
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
        """Return how many were spawned, per compute element.

        The VOs of the DiracX configuration share a compute element; without one, the VO has it for itself.
        Where the rules of a compute element ask for waiting jobs, the database of task queues says what they
        require, or else the job database how many there are.
        """
        from gubbins.logic import my_pilots as logic

        vos = [self.vo] if config is None else list(config.registry)
        asked = await logic.request_pilots(
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
            await spawn_pilots(self.vo, asked)
        except BaseException:
            # A task that was submitted all the same finds that its request is gone.
            for ce_name, stamps in asked.items():
                await logic.withdraw_requests(my_pilot_db, ce_name, stamps)
            raise
        return {ce_name: len(stamps) for ce_name, stamps in asked.items()}


async def spawn_pilots(vo: str, asked: Mapping[str, Sequence[str]]) -> None:
    """Submit a `MyPilotTask` for each of these requests {compute element: stamps}, of all of these by turns."""
    rows = zip_longest(*([(ce_name, stamp) for stamp in stamps] for ce_name, stamps in asked.items()))
    each = [request for row in rows for request in row if request is not None]
    tasks = [MyPilotTask(ce_name, vo) for ce_name, _ in each]
    await schedule_many(tasks, labels=[{LABEL_REQUESTED: stamp} for _, stamp in each])


@dataclass
class MyCheckPilotsTask(PeriodicVoAwareBaseTask):
    """Moves the states of the VO's pilots, one step each, and tells DiracX's pilot registry where there is one."""

    vo: str

    default_schedule: ClassVar[TaskScheduleBase] = IntervalSeconds(30)

    async def execute(
        self,
        my_pilot_db: PilotDB,
        pilot_registry: PilotRegistry = None,  # type: ignore[assignment]  # injected where there is one
        **kwargs: Any,
    ) -> dict[str, int]:
        """Return how many pilots entered each state."""
        from gubbins.logic import my_pilots as logic

        counts = await logic.transition_pilot_states(my_pilot_db, self.vo)
        if pilot_registry is not None:
            await logic.update_registry(my_pilot_db, pilot_registry, self.vo)
        return {str(status): count for status, count in counts.items()}


@dataclass
class MyCollectOutputsTask(PeriodicVoAwareBaseTask):
    """Collects the output of the VO's ended pilots. It may be slow: no check waits for it.

    Where the rules of a compute element say so, DiracX's pilot registry gets it, too.
    """

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
    """Takes downtimes over from DiracX's resource status, where that database is configured."""

    default_schedule: ClassVar[TaskScheduleBase] = IntervalSeconds(300)

    async def execute(
        self,
        my_pilot_db: PilotDB,
        resource_status_db: ResourceStatus = None,  # type: ignore[assignment]  # injected where there is one
        **kwargs: Any,
    ) -> dict[str, str]:
        """Return why each compute element is down that is.

        Raises:
            DowntimeError: the resource status cannot be read.
        """
        from gubbins.logic import my_pilots as logic

        return {} if resource_status_db is None else await logic.import_downtimes(my_pilot_db, resource_status_db)


@dataclass
class MyPilotReportTask(PeriodicBaseTask):
    """Logs how many pilots there are in each state, over all VOs and compute elements."""

    default_schedule: ClassVar[TaskScheduleBase] = CronSchedule("0 * * * *")

    async def execute(self, my_pilot_db: PilotDB, **kwargs: Any) -> dict[str, Any]:
        """Return what was logged, as {VO: {compute element: {state: number}}}."""
        from gubbins.logic import my_pilots as logic

        summary = await logic.count_pilots(my_pilot_db)
        totals: dict[str, int] = {}
        for vo, ces in sorted(summary.items()):
            for ce_name, states in sorted(ces.items()):
                logger.info("Pilots of %s at %s: %s", vo, ce_name, _in_words(states))
                for state, count in states.items():
                    totals[state] = totals.get(state, 0) + count
        logger.info("Pilots in all: %s", _in_words(totals))
        return summary


@dataclass
class MyPrunePilotsTask(PeriodicBaseTask):
    """Deletes pilots that ended long ago, of every VO, with their history: the oldest first, in small batches.

    Raises:
        ValueError: when a number is out of range.
    """

    keep_days: float = field(default=30.0, kw_only=True)
    """Time for which a pilot is kept after its end; more than 0."""
    batch: int = field(default=1_000, kw_only=True)
    """Pilots in one transaction, 1-10,000."""
    at_most: int = field(default=100_000, kw_only=True)
    """Pilots in one run; the next one goes on."""

    default_schedule: ClassVar[TaskScheduleBase] = CronSchedule("41 * * * *")

    def __post_init__(self) -> None:
        if not 0 < self.keep_days <= 36_500:
            raise ValueError(f"keep_days must be more than 0, and 36,500 at most, not {self.keep_days}")
        if not 1 <= self.batch <= 10_000:
            raise ValueError(f"batch must be between 1 and 10,000, not {self.batch}")
        if self.at_most < 1:
            raise ValueError(f"at_most must be 1 or more, not {self.at_most}")

    async def execute(self, my_pilot_db: PilotDB, **kwargs: Any) -> int:
        """Return how many were deleted."""
        from gubbins.logic import my_pilots as logic

        keep = timedelta(days=self.keep_days)
        gone = await logic.prune_pilots(my_pilot_db, keep=keep, batch=self.batch, at_most=self.at_most)
        if gone:
            logger.info("Deleted %d pilots that ended more than %g days ago", gone, self.keep_days)
        return gone


def _in_words(states: dict[str, int]) -> str:
    return ", ".join(f"{states[s]} {s}" for s in MyPilotStatus if states.get(s)) or "none"
