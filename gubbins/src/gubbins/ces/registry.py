"""Registry of back ends: load, validate settings, instantiate."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import BaseModel, ValidationError

from gubbins.domain.exceptions import CESettingsError

from .protocol import CEBackend, CEDescription, CESettings

GROUP = "gubbins.ces"


def available_backends() -> list[str]:
    """The names of the installed back ends."""
    return sorted(_installed(entry_points))


@functools.lru_cache(maxsize=1)
def _installed(look_up: Callable[..., Any]) -> Mapping[str, EntryPoint]:
    """Installed back ends by name; read once, for that reads a file of every installed distribution."""
    found: dict[str, EntryPoint] = {}
    for entry_point in look_up(group=GROUP):
        found.setdefault(entry_point.name, entry_point)
    return found


def load_backend(name: str) -> type[CEBackend[Any]]:
    """The class of a back end.

    Raises:
        CESettingsError: it is not installed.
    """
    if (entry_point := _installed(entry_points).get(name)) is not None:
        backend: type[CEBackend[Any]] = entry_point.load()
        return backend
    raise CESettingsError(
        [("backend", f"unknown back end {name!r}, installed are {', '.join(available_backends())}")]
    )


OF_VOS = "vos"
"""Key of the settings under which there are those that differ for some VOs."""


def settings_for(settings: Mapping[str, Any], vo: str | None) -> dict[str, Any]:
    """The settings with which a VO uses a compute element; None: those that hold for all."""
    common = {name: value for name, value in settings.items() if name != OF_VOS}
    return common | (settings.get(OF_VOS, {}).get(vo) or {})


def validate_all_settings(backend: str, settings: Mapping[str, Any]) -> None:
    """Check the settings of each VO that has some of its own, or else those for all.

    Raises:
        CESettingsError: as `validate_settings` does; a mistake of one VO is below `vos.NAME`.
    """
    of_vos: Mapping[str, Any] = settings.get(OF_VOS, {})
    for vo in of_vos or (None,):
        try:
            validate_settings(backend, settings_for(settings, vo))
        except CESettingsError as error:
            if vo is None or error.problems[0][0] == "backend":
                raise
            raise CESettingsError(
                [(path.replace("settings", f"vos.{vo}", 1), what) for path, what in error.problems]
            ) from error


def validate_settings(backend: str, settings: Mapping[str, Any]) -> CESettings:
    """The settings of a back end, checked.

    Raises:
        CESettingsError: the back end is not installed, or does not understand them; holds all mistakes.
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
    """The message of a validation error, without the value: it may be a secret."""
    if problem["type"] == "extra_forbidden":
        return f"unknown field; there are {', '.join(model.model_fields)}"
    return "missing" if problem["type"] == "missing" else str(problem["msg"]).removeprefix("Value error, ")


def make_backend(backend: str, ce: CEDescription, settings: Mapping[str, Any]) -> CEBackend[Any]:
    """A back end ready to be spoken to; `await backend.close()` when done.

    Raises:
        CESettingsError: the back end is not installed, or does not understand its settings.
    """
    return load_backend(backend)(ce, validate_settings(backend, settings))
