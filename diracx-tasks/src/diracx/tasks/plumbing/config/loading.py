"""Reads the configuration of tasks, and reports all mistakes in it."""

from __future__ import annotations

import os
from pathlib import Path as FilePath
from typing import Any

from pydantic import BaseModel, ValidationError

from ..exceptions import TaskConfigError
from .merge import Path, mapping, merge_problems
from .published import from_published_layout
from .schema import LimitConfig, ObjectLimits, PeriodicTaskConfig, TaskInstance, TaskOverride, TasksConfig
from .source import Problem, Source, nearest

#: Variable with the path of the YAML file; if unset or empty, `Systems.Tasks` of the DiracX configuration is used.
CONFIG_PATH_VARIABLE = "DIRACX_TASKS_CONFIG"
_SECTION = "Systems.Tasks"


def load_tasks_config(path: FilePath | None = None, config: object | None = None) -> TasksConfig:
    """Read the configuration of tasks.

    From the YAML file `path`, else the one that `DIRACX_TASKS_CONFIG` names, else `config.systems["Tasks"]`
    of a DiracX configuration, else empty. Raises `TaskConfigError` with one line per problem.
    """
    raw, source = read_raw_config(path, config)
    found, problems = parsed(raw, source)
    if found is None or problems:
        raise TaskConfigError("\n".join(source.report(problems)))
    return found


def read_raw_config(path: FilePath | None = None, config: object | None = None) -> tuple[Any, Source]:
    """Read the configuration without validation, and its source. Arguments as `load_tasks_config`.

    Raises:
        TaskConfigError: the file cannot be read, or is not YAML.
    """
    if path is None and os.environ.get(CONFIG_PATH_VARIABLE):
        path = FilePath(os.environ[CONFIG_PATH_VARIABLE])
    if path is not None:
        return _read_yaml(path)
    return from_published_layout(mapping(getattr(config, "systems", None)).get("Tasks")), Source(_SECTION)


def _read_yaml(path: FilePath) -> tuple[Any, Source]:
    import yaml

    from .safe_yaml import SafeLoader

    try:
        if (path.is_fifo() or path.is_char_device()) and not path.samefile(os.devnull):  # might never end
            raise OSError(None, "it is no regular file")
        text = path.read_text(encoding="utf-8")
        # Twice, as making values changes the nodes.
        source, raw = Source(str(path), yaml.compose(text, SafeLoader)), yaml.load(text, SafeLoader)  # noqa: S506
        if isinstance(raw, dict) and raw.keys() == {"tasks"}:
            raw, source = raw["tasks"], source.below("tasks")
        return from_published_layout(raw), source
    except OSError as exc:
        raise TaskConfigError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        at = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise TaskConfigError(f"{path}: not valid YAML: {at}{exc.problem or exc.context}") from exc
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as exc:
        raise TaskConfigError(f"{path}: not valid YAML: {' '.join(str(exc).split())}") from exc


def parsed(raw: Any, source: Source) -> tuple[TasksConfig | None, list[Problem]]:
    """Validate a configuration. Returns it, None if it is malformed, and its problems."""
    problems = [
        Problem(path, "is a duplicate key, of which only the last one would count: merge them")
        for path in source.duplicates()
    ]
    try:
        found = TasksConfig.model_validate({} if raw is None else raw)
    except ValidationError as exc:
        # An error without a path comes from the check of the merged layers, whose problems are added one by one.
        errors = [error for error in exc.errors() if error["loc"] or error["type"] != "value_error"]
        merged = [Problem(*problem) for problem in merge_problems(raw)]
        return None, [*problems, *map(_problem, errors), *merged]
    found._source = source
    return found, problems


#: Messages for users by type of pydantic's error.
_MUST_BE = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "float_type": "a number",
    "finite_number": "a finite number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "string_type": "text",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "enum": "{expected}",
}


def _problem(error: Any) -> Problem:
    """Convert a validation error of pydantic."""
    where = tuple(str(part) for part in error["loc"] if part != "[key]")
    kind, given = error["type"], error["input"]
    if kind == "extra_forbidden":
        return Problem(where, f"unknown field{nearest(where[-1], _model_at(where[:-1]).model_fields)}")
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return Problem(where, f"must be a mapping of names to values, not {given!r}")
    if kind in _MUST_BE:
        # YAML reads 1e-3 as text.
        text = "the text " if isinstance(given, str) and _MUST_BE[kind].endswith("number") else ""
        expected = _MUST_BE[kind].format(**error.get("ctx", {}))
        return Problem(where, f"must be {expected}, not {text}{given!r}")
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return Problem(where, message)
    return Problem(where, f"{message[:1].lower()}{message[1:]}, not {given!r}")


def _model_at(where: Path) -> type[BaseModel]:
    """Return the model of the section at a path."""
    match where:
        case (*_, "periodic"):
            return PeriodicTaskConfig
        case ("limits", _, _, *_) | ("vo_limits", _, _, _, *_):
            return LimitConfig
        case ("limits", _) | ("vo_limits", _, _):
            return ObjectLimits
        case (*_, "instances", _):
            return TaskInstance
        case ():
            return TasksConfig
    return TaskOverride
