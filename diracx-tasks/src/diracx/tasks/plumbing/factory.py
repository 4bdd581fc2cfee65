"""The registry of tasks and their execution without a worker, under the module name of the published package."""

from .registry import TaskRegistry, load_task_registry
from .standalone import task_wrapper, wrap_task

__all__ = ["TaskRegistry", "load_task_registry", "task_wrapper", "wrap_task"]
