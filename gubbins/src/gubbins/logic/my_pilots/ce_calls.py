"""From a row of the database to a back end that can be spoken to."""

from __future__ import annotations

__all__ = ["backend_of", "describe_failure"]

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from gubbins.ces import CEBackend, CEDescription, make_backend
from gubbins.db.sql.schema import MAX_REASON_CHARS
from gubbins.domain.rules import rules_of
from gubbins.domain.text import one_line

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 5
"""Giving back connections may take so long: what the compute element has answered waits for it."""


@contextlib.asynccontextmanager
async def backend_of(ce: Mapping[str, Any]) -> AsyncIterator[CEBackend[Any]]:
    """The back end of a compute element, closed afterwards; what goes wrong then is worth a line in the log only.

    Raises:
        CESettingsError: the back end is not installed here, or its settings are wrong.
    """
    description = CEDescription(ce["name"], ce["capacity"], ce["success_rate"])
    backend = make_backend(ce["backend"], description, ce["settings"])
    try:
        yield backend
    finally:
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await backend.close()
        except Exception as error:
            why = f"no end within {CLOSE_SECONDS:g} s" if isinstance(error, TimeoutError) else one_line(error)
            logger.warning("Cannot give back the connections to %s: %s", ce["name"], why)


def describe_failure(ce: Mapping[str, Any], error: Exception) -> str:
    """One line for people: what a compute element did instead of answering."""
    if isinstance(error, TimeoutError) and not str(error):
        return f"no answer within {rules_of(ce).timeout_seconds:g} s"
    return one_line(error, MAX_REASON_CHARS)
