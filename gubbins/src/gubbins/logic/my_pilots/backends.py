"""From a row of the database to a back end that can be spoken to."""

from __future__ import annotations

__all__ = ["backend_of", "describe_failure"]

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from gubbins.ces import CEBackend, CEDescription, make_backend

from .rules import rules_of


@contextlib.asynccontextmanager
async def backend_of(ce: Mapping[str, Any]) -> AsyncIterator[CEBackend[Any]]:
    """The back end of a compute element, closed afterwards.

    Raises:
        CESettingsError: the back end is not installed here, or its settings are wrong.
    """
    description = CEDescription(ce["name"], ce["capacity"], ce["success_rate"])
    backend = make_backend(ce["backend"], description, ce["settings"])
    try:
        yield backend
    finally:
        await backend.close()


def describe_failure(ce: Mapping[str, Any], error: Exception) -> str:
    """One line for people: what a compute element did instead of answering."""
    if isinstance(error, TimeoutError) and not str(error):
        return f"no answer within {rules_of(ce).timeout_seconds:g} s"
    return " ".join(str(error).split()) or type(error).__name__
