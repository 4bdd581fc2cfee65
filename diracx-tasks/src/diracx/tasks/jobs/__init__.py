"""Background tasks of the DiracX job system: thin wrappers over `diracx.logic.jobs`."""

from __future__ import annotations

from .clean_sandbox_store import CleanSandboxStoreTask
from .dummy_job_executor import DummyJobExecutorMonitorTask, DummyJobExecutorTask

__all__ = ["CleanSandboxStoreTask", "DummyJobExecutorMonitorTask", "DummyJobExecutorTask"]
