"""Read model of task classes: kind, queue, schedule, retry policy, arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..plumbing._util.secrets import MASK
from ..plumbing.base_task import BaseTask, PeriodicBaseTask, PeriodicVoAwareBaseTask
from ..plumbing.config import describe_schedule
from ..plumbing.messages.arguments import secret_names
from ..plumbing.retry_policies import ExponentialBackoff, NoRetry, RetryPolicyBase


def task_classes(registry: Mapping[str, type[BaseTask]]) -> list[dict[str, Any]]:
    """Return a record for each task class of a registry, by name."""
    return [_describe(name, task_class) for name, task_class in sorted(registry.items())]


def _describe(name: str, task_class: type[BaseTask]) -> dict[str, Any]:
    periodic = issubclass(task_class, PeriodicBaseTask)
    if issubclass(task_class, PeriodicVoAwareBaseTask):
        kind = "periodic, per VO"
    else:
        kind = "periodic" if periodic else "one-shot"
    return {
        "name": name,
        "kind": kind,
        "priority": str(task_class.priority),
        "size": str(task_class.size),
        "schedule": describe_schedule(getattr(task_class, "default_schedule", None)) if periodic else None,
        "enabled": bool(getattr(task_class, "_enabled", True)),
        "retry": _retry(task_class.retry_policy),
        "dlq_eligible": task_class.dlq_eligible,
        "arguments": shown_signature(task_class),
        "module": task_class.__module__,
    }


def shown_signature(task_class: type[BaseTask]) -> str:
    """Format the signature of a task class, with secret defaults masked."""
    try:
        parameters = inspect.signature(task_class).parameters.values()
    except (TypeError, ValueError):
        return "(…)"
    shown = []
    for parameter in parameters:
        annotation = parameter.annotation
        if isinstance(annotation, str):
            text = f"{parameter.replace(annotation=parameter.empty, default=parameter.empty)}: {annotation}"
        else:
            text = str(parameter.replace(default=parameter.empty))
        default = parameter.default
        if default is not parameter.empty and parameter.name in secret_names(task_class):
            text += f" = {MASK}"
        elif default is not parameter.empty:
            text += f" = {'…' if ' at 0x' in repr(default) else repr(default)}"
        shown.append(text)
    return f"({', '.join(shown)})"


def _retry(policy: RetryPolicyBase) -> str:
    match policy:
        case NoRetry():
            return "none"
        case ExponentialBackoff(base_delay_seconds=delay, max_retries=retries):
            return f"{retries} times, first after {delay:g} s"
    return repr(policy)
