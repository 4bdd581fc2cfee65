"""`diracx-tasks` of this tree, with labels of the submitter in messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diracx.tasks.plumbing import schedule_many

from .diracx_tasks import BY_NAME
from .ours import client as unlabelled

_LABELS = {"origin": "benchmark", "request": 4711, "tags": ["one", "two"]}


class _Client(unlabelled):
    async def submit_many(self, task: str, arguments: Iterable[Any]) -> None:
        task_class = BY_NAME[task]
        await schedule_many([task_class(argument) for argument in arguments], labels=_LABELS)


client = _Client
