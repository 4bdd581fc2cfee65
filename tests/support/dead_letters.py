"""Dead letters of a task, stored in a database."""

from __future__ import annotations

__all__ = ["KINDS", "STREAM", "Work", "make", "rows", "store"]

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar

from diracx.tasks.plumbing import BaseTask, Priority, Size
from diracx.tasks.plumbing.broker.models import TaskMessage
from diracx.tasks.plumbing.persistence import DeadLetter, TaskDB

STREAM = "diracx:tasks:background:small"


KINDS = ["sqlite", "mariadb", "postgresql"]


@dataclass
class Work(BaseTask):
    number: int

    priority: ClassVar[Priority] = Priority.BACKGROUND
    size: ClassVar[Size] = Size.SMALL

    async def execute(self) -> int:
        return self.number


def make(number: int = 0, *, delivery_id: str | None = None, **changes: Any) -> DeadLetter:
    message = TaskMessage(
        task_id=f"task-{number}", task_name="test:Work", task_args=[number], labels={"attempts": [{"type": "E"}]}
    )
    values: dict[str, Any] = {
        "task_id": message.task_id,
        "task_name": "test:Work",
        "reason": "exhausted",
        "detail": f"detail {number}",
        "data": message.dumpb(),
        "attempts": [{"type": "ValueError", "message": "no", "traceback": "…", "started": datetime.now(UTC)}],
        "delivery_id": delivery_id or f"{STREAM}/{number}-0",
    }
    return DeadLetter(**values | changes)


async def store(db: TaskDB, *dead_letters: DeadLetter) -> None:
    async with db:
        for each in dead_letters:
            await db.insert(each)


async def rows(db: TaskDB, **where: Any) -> list[dict[str, Any]]:
    async with db:
        return await db.search(**{"status": None, "limit": 10_000, **where})
