"""Registry of installed back ends: load them, validate their settings, create instances."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from diracx.tasks.plumbing.plugins import load_plugin
from pydantic import BaseModel, ValidationError

from gubbins.domain.exceptions import CESettingsError
from gubbins.domain.rules import OF_VOS

from .protocol import CEBackend, CEDescription, CESettings

GROUP = "gubbins.ces"


def available_backends() -> list[str]:
    """Names of the installed back ends."""
    return sorted(_installed(entry_points))


@functools.lru_cache(maxsize=1)
def _installed(entry_points: Callable[..., Any]) -> Mapping[str, EntryPoint]:
    """Entry points of the back ends by name; cached, for it reads a file of every installed distribution."""
    found: dict[str, EntryPoint] = {}
    for entry_point in entry_points(group=GROUP):
        found.setdefault(entry_point.name, entry_point)
    return found


def load_backend(name: str) -> type[CEBackend[Any]]:
    """Load the class of a back end.

    Raises:
        CESettingsError: it is not installed.
    """
    if (entry_point := _installed(entry_points).get(name)) is not None:
        backend: type[CEBackend[Any]] = load_plugin(entry_point.load)
        return backend
    raise CESettingsError(
        [("backend", f"unknown back end {name!r}, installed are {', '.join(available_backends())}")]
    )


def settings_for(settings: Mapping[str, Any], vo: str | None) -> dict[str, Any]:
    """Settings for a VO; None: the common ones."""
    common = {name: value for name, value in settings.items() if name != OF_VOS}
    return common | (settings.get(OF_VOS, {}).get(vo) or {})


def validate_all_settings(backend: str, settings: Mapping[str, Any]) -> None:
    """Validate the settings of each VO with its own ones, or else the common ones.

    Raises:
        CESettingsError: as `validate_settings`; errors in settings of a VO have paths below `vos.NAME`.
    """
    of_vos: Mapping[str, Any] = settings.get(OF_VOS, {})
    for vo in of_vos or (None,):
        try:
            validate_settings(backend, settings_for(settings, vo))
        except CESettingsError as error:
            if vo is None or error.problems[0][0] == "backend":
                raise
            raise CESettingsError(
                [(path.replace("settings", f"vos.{vo}", 1), message) for path, message in error.problems]
            ) from error


def validate_settings(backend: str, settings: Mapping[str, Any]) -> CESettings:
    """Validate the settings of a back end.

    Raises:
        CESettingsError: the back end is not installed, or the settings are invalid; lists all errors.
    """
    model = load_backend(backend).Settings
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise CESettingsError(
            [
                (".".join(["settings", *(str(part) for part in problem["loc"])]), problem_of(problem, model))
                for problem in error.errors()
            ]
        ) from error


def problem_of(problem: Any, model: type[BaseModel]) -> str:
    """Message of a validation error, without the value, which may be a secret."""
    if problem["type"] == "extra_forbidden":
        return f"unknown field; there are {', '.join(model.model_fields)}"
    return "missing" if problem["type"] == "missing" else str(problem["msg"]).removeprefix("Value error, ")


def make_backend(backend: str, ce: CEDescription, settings: Mapping[str, Any]) -> CEBackend[Any]:
    """Create a back end; `await backend.close()` after its use.

    Raises:
        CESettingsError: the back end is not installed, or its settings are invalid.
    """
    return load_backend(backend)(ce, validate_settings(backend, settings))
