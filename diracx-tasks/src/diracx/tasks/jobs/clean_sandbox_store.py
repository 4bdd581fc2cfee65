"""Task that deletes unused sandboxes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from ..plumbing.base_task import PeriodicBaseTask
from ..plumbing.depends import NoTransaction
from ..plumbing.enums import Priority, Size
from ..plumbing.lazy import lazy_names
from ..plumbing.retry_policies import ExponentialBackoff
from ..plumbing.schedules import CronSchedule

if TYPE_CHECKING:
    from diracx.core.settings import SandboxStoreSettings
    from diracx.db.sql import SandboxMetadataDB
else:
    __getattr__ = lazy_names(
        __name__, {"diracx.core.settings": ["SandboxStoreSettings"], "diracx.db.sql": ["SandboxMetadataDB"]}
    )


@dataclass
class CleanSandboxStoreTask(PeriodicBaseTask):
    """Delete sandboxes that belong to no job, daily at 6:00 UTC. Returns their number.

    The logic opens a short transaction per batch, so that none is open while objects are deleted.
    """

    priority = Priority.BACKGROUND
    size = Size.MEDIUM
    retry_policy = ExponentialBackoff(base_delay_seconds=300, max_retries=3)
    default_schedule = CronSchedule("0 6 * * *")

    async def execute(
        self,
        sandbox_metadata_db: Annotated[SandboxMetadataDB, NoTransaction()],
        settings: SandboxStoreSettings,
    ) -> int:
        from diracx.logic.jobs.sandboxes import clean_sandboxes

        return await clean_sandboxes(sandbox_metadata_db, settings)
