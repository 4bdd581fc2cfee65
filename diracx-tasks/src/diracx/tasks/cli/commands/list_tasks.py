"""`list`: which tasks there are."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from ..errors import one_line
from ..options import JsonOption, ModuleOption
from ..output import echo, echo_json, show_table, table

if TYPE_CHECKING:
    from ...plumbing.base_task import BaseTask
    from ...plumbing.retry_policies import RetryPolicyBase


def list_tasks(as_json: JsonOption = False, module: ModuleOption = None) -> None:
    """List the installed tasks, and those of the given modules.

    Warns of installed distributions whose tasks are left out, as they are no extension of DiracX.

    Example: diracx-task-run list --module my_tasks.py
    """
    from ...plumbing.registry import unselected_tasks
    from ..runtime.registry import load_registry

    rows = [_describe(name, task_class) for name, task_class in sorted(load_registry(module).items())]
    if as_json:
        echo_json(rows, indent=2)
    else:
        _print_table(rows)
    for line in unselected_tasks():
        echo(f"warning: {one_line(line)}", err=True)


def _describe(name: str, task_class: type[BaseTask]) -> dict[str, Any]:
    from ...plumbing.base_task import PeriodicBaseTask, PeriodicVoAwareBaseTask
    from ...plumbing.config import describe_schedule

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
        "arguments": _arguments(task_class),
        "module": task_class.__module__,
    }


def _arguments(task_class: type[BaseTask]) -> str:
    """The signature of the class, as its author wrote it."""
    from ...plumbing._util.secrets import MASK
    from ...plumbing.messages.arguments import secret_names

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
    from ...plumbing.retry_policies import ExponentialBackoff, NoRetry

    match policy:
        case NoRetry():
            return "none"
        case ExponentialBackoff(base_delay_seconds=delay, max_retries=retries):
            return f"{retries} times, first after {delay:g} s"
    return repr(policy)


def _print_table(rows: list[dict[str, Any]]) -> None:
    shown = [
        (
            row["name"],
            row["kind"],
            row["priority"],
            row["size"],
            (row["schedule"] or "-") + ("" if row["enabled"] else " (off)"),
            row["retry"],
            "yes" if row["dlq_eligible"] else "no",
            row["arguments"],
            row["module"],
        )
        for row in rows
    ]
    columns = ("name", "kind", "priority", "size", "schedule", "retry", "dead letter", "arguments", "module")
    show_table(table(columns, shown), "no tasks are installed; load a file's with --module")
