"""Loads the task registry, and makes a task from its name and JSON arguments."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from ...plumbing.base_task import BaseTask
from ...plumbing.exceptions import TaskArgumentsError
from ...plumbing.lock_registry import validate_registry
from ...plumbing.messages.arguments import secret_names
from ...plumbing.messages.typed_arguments import check_arguments
from ...plumbing.registry import TaskRegistry, load_task_registry, tasks_of_module
from ...plumbing.task_names import resolve_task_name
from ..errors import CliError, UsageProblem, shortened

logger = logging.getLogger(__package__)


def load_registry(modules: Sequence[str] | None, *, only: str | None = None) -> TaskRegistry:
    """Load the tasks of the modules and the installed ones; modules take precedence.

    Args:
        only: name of the only task that is needed. If a module has it, installed tasks are not loaded, which takes
            a second.
    """
    try:
        validate_registry()
        registry = TaskRegistry()
        for name in modules or ():
            registry = registry.merged_with(_tasks_of(name))
        if only is not None and only in registry:
            return registry
        return registry.merged_with(load_task_registry())
    except RuntimeError as error:
        raise CliError(f"{error}; repair or uninstall the package that names it") from error


def _tasks_of(name: str) -> TaskRegistry:
    module = _import(name)
    try:
        found = tasks_of_module(module)
    except TypeError as error:
        raise CliError(f"--module {name} cannot be loaded: {error}") from error
    if not found:
        raise UsageProblem(
            f"--module {name} defines no task; a task is a class derived from BaseTask, "
            f"PeriodicBaseTask or PeriodicVoAwareBaseTask in {module.__name__} itself"
        )
    return found


def _import(name: str) -> ModuleType:
    try:
        return _import_file(Path(name)) if name.endswith(".py") else _import_name(name)
    except CliError:
        raise
    except (Exception, SystemExit) as error:
        where = _where(error)
        raise CliError(f"--module {name} cannot be imported: {type(error).__name__}: {error}{where}") from error


def _import_file(path: Path) -> ModuleType:
    """Import a file as a module named after its stem, with its directory on the path."""
    if not path.is_file():
        raise UsageProblem(f"--module {path}: no such file")
    path = path.resolve()
    if "." in path.stem or ":" in path.stem:
        raise UsageProblem(f"--module {path.name}: a module name cannot have '.' or ':' in it; rename the file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = importlib.import_module(path.stem)
    if getattr(module, "__file__", None) != str(path):
        raise UsageProblem(f"--module {path.name} would hide the module {path.stem!r}; rename the file")
    return module


def _import_name(name: str) -> ModuleType:
    if not all(name.split(".")):
        raise UsageProblem(f"--module {name!r} is no module name")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageProblem(
                f"--module {name}: no such module on the path or in this directory; give a file with its .py"
            ) from error
        raise


def _where(error: BaseException) -> str:
    """Return ` (file:line)` of the innermost frame outside Python's import machinery and this module."""
    if isinstance(error, SyntaxError) and error.filename:
        return ""  # its text has the file
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith("<") and frame.filename != __file__ and "importlib" not in frame.filename:
            return f" ({frame.filename}:{frame.lineno})"
    return ""


def find_task(registry: Mapping[str, type[BaseTask]], name: str) -> str:
    """Return the registry name of a task, given that or its class name."""
    if (found := resolve_task_name(name, registry)) is not None:
        return found
    names = "\n".join(["known tasks:", *(f"  {each}" for each in sorted(registry))])
    similar = " or ".join(map(repr, nearest(name, registry)))
    hint = f"did you mean {similar}?" if similar else "--module loads a file's tasks"
    raise CliError(f"unknown task {name!r}; {hint}", detail=names)


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return up to three names (`category:ClassName`) of the most similar class name, else a similar name."""
    by_text: dict[str, list[str]] = {}
    for each in known:
        for text in (each, each.partition(":")[2]):
            by_text.setdefault(text.lower(), []).append(each)
    for text in (name.rpartition(":")[2].lower(), name.lower()):
        for similar in get_close_matches(text, by_text, n=1, cutoff=0.6):
            return by_text[similar][:3]
    return []


def make_task(registry: TaskRegistry, name: str, args: str, kwargs: str) -> tuple[str, BaseTask]:
    """Make a task from JSON arguments, checked against its class. Returns its registry name and the task."""
    name = find_task(registry, name)
    secret = bool(secret_names(registry[name]))
    positional = _json("--args", args, list, "a JSON list such as '[1, \"x\"]'", secret)
    named = _json("--kwargs", kwargs, dict, 'a JSON object such as \'{"name": "x"}\'', secret)
    try:
        return name, check_arguments(registry[name], positional, named)
    except TaskArgumentsError as error:
        raise UsageProblem(f"{name}: {error}") from error


def _json(option: str, text: str, shape: type, example: str, secret: bool) -> Any:
    shown = option if secret else f"{option} {shortened(text)}"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at character {error.pos + 1}"
        raise UsageProblem(f"{shown} is not valid JSON: {problem}; write {example}") from error
    except (ValueError, RecursionError) as error:
        raise UsageProblem(f"{shown} cannot be read: {error}; write {example}") from error
    if not isinstance(value, shape):
        raise UsageProblem(f"{shown} is the wrong kind of JSON; write {example}")
    return value
