"""The three ways to define a task class, and values that a task may return."""

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import ClassVar

from diracx.tasks.plumbing import BaseTask, Priority, Size
from pydantic import BaseModel, Field


@dataclass
class Replicate(BaseTask):
    """A dataclass: the usual way."""

    source: Path
    targets: list[str]
    deadline: date | None = None

    priority = Priority.REALTIME
    size = Size.SMALL
    time_limit_seconds = 60

    async def execute(self) -> dict[str, str]:
        return dict.fromkeys(self.targets, f"{self.source} by {self.deadline}")


class Resize(BaseTask, BaseModel):
    """A pydantic model: its arguments are checked when it is made. Class variables need `ClassVar`."""

    width: int = Field(gt=0)
    height: int = Field(gt=0)

    priority: ClassVar[Priority] = Priority.BACKGROUND

    async def execute(self) -> int:
        return self.width * self.height


class Count(BaseTask):
    """A plain class: each parameter is kept in an attribute of its name."""

    def __init__(self, up_to: int, step: int = 1) -> None:
        self.up_to = up_to
        self.step = step

    async def execute(self) -> list[int]:
        return list(range(0, self.up_to, self.step))
