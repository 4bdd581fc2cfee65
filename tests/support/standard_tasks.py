"""Tasks that record when they run, for tests in this process."""

from __future__ import annotations

__all__ = ["SEEN", "Background", "Broken", "Echo"]

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from diracx.tasks.plumbing import (
    BaseTask,
    ExponentialBackoff,
    Priority,
)

SEEN: list[Any] = []


@dataclass
class Echo(BaseTask):
    value: Any = None

    async def execute(self) -> Any:
        SEEN.append(self.value)
        return self.value


@dataclass
class Background(Echo):
    priority = Priority.BACKGROUND


class Broken(BaseTask):
    retry_policy = ExponentialBackoff(base_delay_seconds=0.02, max_retries=3)
    dlq_eligible = True

    async def execute(self) -> None:
        SEEN.append(datetime.now(UTC))
        raise ValueError("there is no such site")
