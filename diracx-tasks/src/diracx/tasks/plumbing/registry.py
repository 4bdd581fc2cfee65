"""Registry of task classes, loaded from the entry points of installed packages."""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Self

from .base_task import BaseTask, PeriodicBaseTask, PeriodicVoAwareBaseTask
from .exceptions import SendTaskError
from .messages.arguments import check_secret_fields
from .plugins import load_plugin

logger = logging.getLogger(__name__)

ENTRY_POINT_PREFIX = "diracx.tasks."
_BASES = {BaseTask, PeriodicBaseTask, PeriodicVoAwareBaseTask}


class _Names(dict[type[BaseTask], str]):
    """Registry name of each class. Indexing with a class that is not registered raises `SendTaskError`."""

    def __missing__(self, task_class: type[BaseTask]) -> str:
        raise SendTaskError(
            f"{task_class.__module__}.{task_class.__qualname__} is not a registered task: add an entry point "
            f"in a group {ENTRY_POINT_PREFIX}<category>, or load its file with --module"
        )


class TaskRegistry(dict[str, type[BaseTask]]):
    """Mapping of registry names (`category:ClassName`) to task classes, and back.

    Several classes may have one name: the class of an extension that overrides a task of DiracX is executed even
    if the original class is submitted.
    """

    def __init__(self, classes: Mapping[str, type[BaseTask]] | None = None) -> None:
        super().__init__()
        self.names = _Names()
        for name, task_class in (classes or {}).items():
            self.add(name, task_class)

    @classmethod
    def of(cls, classes: Mapping[str, type[BaseTask]]) -> TaskRegistry:
        """Convert a mapping to a registry, unless it is one."""
        return classes if isinstance(classes, TaskRegistry) else cls(classes)

    def add(self, name: str, task_class: type[BaseTask]) -> None:
        """Register a class. The first class of a name is executed.

        Raises:
            TypeError: `secret_fields` of the class has a field that does not exist.
        """
        if task_class.secret_fields:
            check_secret_fields(task_class)
        self.setdefault(name, task_class)
        self.names.setdefault(task_class, name)

    def ambiguous_names(self) -> list[str]:
        """Return a warning for each class name in several categories, or twice in one package and category.

        Default locks of the former have the same key; of the latter, the first class is executed for all.
        """
        by_class_name = defaultdict(list)
        for name, task_class in self.items():
            by_class_name[name.partition(":")[2]].append(f"{name} ({task_class.__module__})")
        by_package = defaultdict(list)
        for task_class, name in self.names.items():
            by_package[name, task_class.__module__.partition(".")[0]].append(task_class.__module__)
        return [
            f"{name} is the name of several classes, in {' and '.join(modules)}: only the first is executed"
            for (name, _), modules in by_package.items()
            if len(modules) > 1
        ] + [
            f"the class name {class_name} is used by {' and '.join(sorted(origins))}: "
            "they share their default locks; rename one, or override its execution_locks"
            for class_name, origins in sorted(by_class_name.items())
            if len(origins) > 1
        ]

    def merged_with(self, other: Mapping[str, type[BaseTask]]) -> Self:
        """Return a registry of both; classes of this one take precedence."""
        merged = type(self)(self)
        merged.names |= self.names
        for name, task_class in other.items():
            merged.add(name, task_class)
        return merged


def load_task_registry(groups: Sequence[str] | None = None) -> TaskRegistry:
    """Load all installed tasks, from the entry points of the groups `diracx.tasks.{category}`.

    Args:
        groups: entry-point groups; by default all with that prefix.

    Raises:
        RuntimeError: names the entry point of a task that cannot be loaded, or is not a task class.
    """
    from importlib.metadata import entry_points

    from diracx.core.extensions import select_from_extension

    if groups is None:
        groups = sorted(group for group in entry_points().groups if group.startswith(ENTRY_POINT_PREFIX))
    registry = TaskRegistry()
    for group in groups:
        category = group.rpartition(".")[2]
        for entry_point in select_from_extension(group=group):
            where = f"entry point {entry_point.name!r} of {group} ({entry_point.value})"
            try:
                task_class = load_plugin(entry_point.load)
                if is_task := inspect.isclass(task_class) and issubclass(task_class, BaseTask):
                    registry.add(f"{category}:{task_class.__name__}", task_class)
            except Exception as error:
                raise RuntimeError(f"{where} cannot be loaded: {error}") from error
            if not is_task:
                raise RuntimeError(f"{where} is not a task class")
    return registry


def unselected_tasks() -> list[str]:
    """Return a warning for each distribution whose tasks are ignored because it is not an extension of DiracX."""
    from importlib.metadata import entry_points

    from diracx.core.extensions import select_from_extension

    installed = entry_points()
    left_out: dict[str, list[str]] = defaultdict(list)
    for group in sorted(group for group in installed.groups if group.startswith(ENTRY_POINT_PREFIX)):
        selected = select_from_extension(group=group)
        for entry_point in installed.select(group=group):
            if entry_point not in selected:
                distribution = entry_point.dist.name if entry_point.dist is not None else "an unknown distribution"
                origin = f"{distribution} (module {entry_point.module.partition('.')[0]})"
                left_out[origin].append(f"{group.removeprefix(ENTRY_POINT_PREFIX)}:{entry_point.name}")
    return [
        f"{origin}: {', '.join(sorted(names))} ignored: DiracX loads entry points of itself and of one extension, "
        "whose module is the entry point `extension` of the group `diracx`; add that to the distribution, or load "
        "the module with --module"
        for origin, names in sorted(left_out.items())
    ]


def tasks_of_module(module: ModuleType) -> TaskRegistry:
    """Return the tasks defined in a module; the last part of its name is their category."""
    category = module.__name__.rpartition(".")[2]
    return TaskRegistry(
        {
            f"{category}:{name}": value
            for name, value in vars(module).items()
            if inspect.isclass(value)
            and issubclass(value, BaseTask)
            and value not in _BASES
            and value.__module__ == module.__name__
        }
    )
