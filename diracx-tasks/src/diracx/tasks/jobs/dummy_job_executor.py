"""Tasks that simulate the execution of jobs, for demonstrations without a site."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict, Field

from ..plumbing.base_task import BaseTask, PeriodicBaseTask
from ..plumbing.enums import Priority, Size
from ..plumbing.lazy import lazy_names
from ..plumbing.lock_registry import JOB
from ..plumbing.locks import BaseLock, MutexLock
from ..plumbing.retry_policies import ExponentialBackoff
from ..plumbing.schedules import IntervalSeconds

if TYPE_CHECKING:
    from diracx.core.models import JobStatus, JobStatusUpdate
    from diracx.db.sql import JobDB, JobLoggingDB, TaskQueueDB

    from ..plumbing.depends import Config
else:
    __getattr__ = lazy_names(
        __name__, {"diracx.db.sql": ["JobDB", "JobLoggingDB", "TaskQueueDB"], "..plumbing.depends": ["Config"]}
    )

_SOURCE = "DummyJobExecutor"
#: Maximum number of jobs of one run of the monitor.
_BATCH = 1000


class DummyJobExecutorSettings(BaseModel):
    """Settings of the simulated execution: `DIRACX_TASKS_DUMMY_JOB_EXECUTOR_<FIELD>`.

    They are read when this module is imported, without the settings classes of DiracX, which are slow to import.
    """

    model_config = ConfigDict(
        alias_generator=lambda name: f"DIRACX_TASKS_DUMMY_JOB_EXECUTOR_{name.upper()}", populate_by_name=True
    )

    enabled: bool = False
    """Schedule the monitor."""
    interval_seconds: int = Field(default=10, gt=0)
    """Interval between polls for received jobs (s)."""

    @classmethod
    def from_environment(cls) -> Self:
        """Read the settings from the environment; names of variables may be in lower case.

        Raises:
            pydantic.ValidationError: names the invalid variable.
        """
        return cls.model_validate({name.upper(): value for name, value in os.environ.items()})


def _update(status: JobStatus) -> JobStatusUpdate:
    from diracx.core.models import JobStatusUpdate

    return JobStatusUpdate(Status=status, MinorStatus=None, ApplicationStatus=None, Source=_SOURCE)


_settings = DummyJobExecutorSettings.from_environment()


@dataclass
class DummyJobExecutorMonitorTask(PeriodicBaseTask):
    """Set received jobs to Waiting and submit an executor for each. Returns their number.

    Scheduled only with DIRACX_TASKS_DUMMY_JOB_EXECUTOR_ENABLED=true.
    """

    priority = Priority.BACKGROUND
    size = Size.SMALL
    default_schedule = IntervalSeconds(_settings.interval_seconds)
    _enabled = _settings.enabled

    async def execute(
        self, config: Config, job_db: JobDB, job_logging_db: JobLoggingDB, task_queue_db: TaskQueueDB
    ) -> int:
        from diracx.core.models import JobStatus, ScalarSearchOperator, ScalarSearchSpec
        from diracx.logic.jobs.status import set_job_statuses

        received = ScalarSearchSpec(
            parameter="Status", operator=ScalarSearchOperator.EQUAL, value=JobStatus.RECEIVED
        )
        _, jobs = await job_db.search(["JobID"], [received], [], per_page=_BATCH, page=1)
        job_ids = [int(job["JobID"]) for job in jobs]
        if not job_ids:
            return 0
        waiting = {datetime.now(UTC): _update(JobStatus.WAITING)}
        await set_job_statuses(
            {job_id: dict(waiting) for job_id in job_ids}, config, job_db, job_logging_db, task_queue_db
        )
        for job_id in job_ids:
            await DummyJobExecutorTask(job_id).schedule()
        return len(job_ids)


@dataclass
class DummyJobExecutorTask(BaseTask):
    """Set one job to Matched, Running and Done. Returns its id."""

    job_id: int

    priority = Priority.NORMAL
    size = Size.LARGE
    retry_policy = ExponentialBackoff(base_delay_seconds=10, max_retries=3)

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, self.job_id)]

    async def execute(
        self, config: Config, job_db: JobDB, job_logging_db: JobLoggingDB, task_queue_db: TaskQueueDB
    ) -> int:
        from diracx.core.models import JobStatus
        from diracx.logic.jobs.status import set_job_statuses

        # The state machine of jobs allows no skipped states; updates need different times.
        now = datetime.now(UTC)
        states = (JobStatus.WAITING, JobStatus.MATCHED, JobStatus.RUNNING, JobStatus.DONE)
        updates = {now + timedelta(milliseconds=step): _update(state) for step, state in enumerate(states)}
        await set_job_statuses({self.job_id: updates}, config, job_db, job_logging_db, task_queue_db)
        return self.job_id
