"""Values of classes of task arguments, and their way to the worker."""

from __future__ import annotations

__all__ = ["Box", "Model", "T", "arrived", "received"]

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from diracx.tasks.plumbing.broker.models import TaskMessage
from diracx.tasks.plumbing.messages.arguments import rebuild
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.submission.client import Binding
from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    computed_field,
)


def arrived(task: Any) -> Any:
    """Submit a task, and build it as the worker does."""
    registry = TaskRegistry({"test:Task": type(task)})
    data = Binding(None, registry).submission(task).message.dumpb()
    return received(data, type(task))


def received(data: bytes, cls: type[Any]) -> Any:
    """Build the task of a message as the worker does."""
    message = TaskMessage.loadb(data)
    return rebuild(cls, message.task_args, message.task_kwargs, message.sig)


class Model(BaseModel):
    low: int
    high: int = Field(default=1, alias="highest")
    _private: int = PrivateAttr(default=0)

    @computed_field
    @property
    def both(self) -> int:
        return self.low + self.high


T = TypeVar("T")


@dataclass
class Box(Generic[T]):
    content: T
