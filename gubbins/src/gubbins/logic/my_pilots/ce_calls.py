"""Helpers for calls to a compute element: open its back end, describe its errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from gubbins.ces import CEBackend, CEDescription, PilotAtCE, make_backend
from gubbins.ces.registry import settings_for
from gubbins.db.sql.schema import MAX_REASON_CHARS
from gubbins.domain.rules import rules_of
from gubbins.domain.text import one_line

logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def backend_of(ce: Mapping[str, Any], vo: str) -> AsyncIterator[CEBackend[Any]]:
    """Open the back end of a compute element with the settings of the VO. Errors of its `close` are only logged.

    Raises:
        CESettingsError: the back end is not installed here, or its settings are wrong.
    """
    description = CEDescription(ce["name"], ce["capacity"], ce["success_rate"])
    backend = make_backend(ce["backend"], description, settings_for(ce["settings"], vo))
    try:
        yield backend
    finally:
        try:
            async with asyncio.timeout(backend.close_seconds):
                await backend.close()
        except Exception as error:
            timed_out = isinstance(error, TimeoutError)
            reason = f"no end within {backend.close_seconds:g} s" if timed_out else one_line(error)
            logger.warning("Cannot close the connections to %s: %s", ce["name"], reason)


def describe_failure(ce: Mapping[str, Any], error: Exception) -> str:
    """Describe a failed call to a compute element in one line."""
    if isinstance(error, TimeoutError) and not str(error):
        return f"no response within {rules_of(ce).timeout_seconds:g} s"
    return one_line(error, MAX_REASON_CHARS)


def at_ce(pilot: Mapping[str, Any]) -> PilotAtCE:
    """Convert a row of the database to the pilot of a call."""
    keys = ("stamp", "vo", "reference", "status", "submitted_at", "started_at")
    return PilotAtCE(*(pilot[key] for key in keys))
