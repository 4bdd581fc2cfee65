"""Task registry, bindings, and execution without a worker, under the published module name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .base_task import BaseTask
from .broker.models import TaskBinding
from .injection.placeholders import find_missing_overrides
from .injection.providers import setup_dependency_overrides
from .registry import TaskRegistry, load_task_registry
from .standalone import task_wrapper, wrap_task
from .submission.client import Binding

if TYPE_CHECKING:
    from .broker import RedisStreamBroker

__all__ = [
    "TaskRegistry",
    "create_task_bindings",
    "find_missing_overrides",
    "load_task_registry",
    "setup_dependency_overrides",
    "task_wrapper",
    "wrap_task",
]


class TaskBindings(dict[type[BaseTask], TaskBinding]):
    """Mapping of task classes to their bindings, for `BaseTask.bind_broker`."""

    source: Binding


def create_task_bindings(
    broker: RedisStreamBroker, task_registry: Mapping[str, type[BaseTask]]
) -> tuple[TaskBindings, dict[str, Callable[..., Any]]]:
    """Return the bindings of tasks to a broker, and functions by name that execute them without a worker."""
    bindings = TaskBindings((cls, TaskBinding(broker, name)) for name, cls in task_registry.items())
    bindings.source = Binding(broker, TaskRegistry.of(task_registry))
    return bindings, {name: wrap_task(cls) for name, cls in task_registry.items()}
