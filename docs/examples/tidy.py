"""A periodic task, submitted by the scheduler."""

import logging
from dataclasses import dataclass

from diracx.tasks.plumbing import IntervalSeconds, PeriodicBaseTask, Priority, Size

logger = logging.getLogger(__name__)


@dataclass
class Tidy(PeriodicBaseTask):
    """Every two seconds; it can wait when there is other work."""

    default_schedule = IntervalSeconds(2)
    priority = Priority.BACKGROUND
    size = Size.SMALL

    async def execute(self) -> None:
        logger.info("all is tidy")
