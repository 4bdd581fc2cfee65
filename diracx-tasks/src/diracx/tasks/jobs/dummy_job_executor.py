"""Jobs that run without a site: for demonstrations, where the life of a job is to be seen from end to end."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, Field

from ..plumbing._util.lazy import lazy_names
from ..plumbing.base_task import BaseTask, PeriodicBaseTask
from ..plumbing.enums import Priority, Size
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
#: Jobs taken up by one run of the monitor.
_BATCH = 1000


class DummyJobExecutorSettings(BaseModel):
    """Settings of the pretended execution of jobs: `DIRACX_TASKS_DUMMY_JOB_EXECUTOR_<FIELD>`.

    The schedule below is made of them when this module is imported, and they are read without the settings of
    DiracX, whose import takes longer than that of all the rest.
    """

    enabled: bool = False
    """Take up received jobs by themselves."""
    interval_seconds: int = Field(default=10, gt=0)
    """Interval between polls for received jobs (s)."""

    @classmethod
    def of_environment(cls) -> Self:
        """As they are set.

        Raises:
            pydantic.ValidationError: when one of them cannot be used.
        """
        variables = {name: f"DIRACX_TASKS_DUMMY_JOB_EXECUTOR_{name.upper()}" for name in cls.model_fields}
        return cls.model_validate({name: os.environ[key] for name, key in variables.items() if key in os.environ})


def _update(status: JobStatus) -> JobStatusUpdate:
    from diracx.core.models import JobStatusUpdate

    return JobStatusUpdate(Status=status, MinorStatus=None, ApplicationStatus=None, Source=_SOURCE)


_settings = DummyJobExecutorSettings.of_environment()


@dataclass
class DummyJobExecutorMonitorTask(PeriodicBaseTask):
    """Takes up the jobs that were received: each becomes Waiting and gets an executor. Returns how many.

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
    """Leads one job through Matched and Running to Done. Returns the job's id."""

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

        # The state machine of jobs refuses leaps, so every state is passed, a moment apart.
        now = datetime.now(UTC)
        states = (JobStatus.WAITING, JobStatus.MATCHED, JobStatus.RUNNING, JobStatus.DONE)
        updates = {now + timedelta(milliseconds=step): _update(state) for step, state in enumerate(states)}
        await set_job_statuses({self.job_id: updates}, config, job_db, job_logging_db, task_queue_db)
        return self.job_id
