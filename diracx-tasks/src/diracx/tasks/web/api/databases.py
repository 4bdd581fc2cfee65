"""Answer requests whose database cannot be used: 503, with the way out."""

from __future__ import annotations

__all__ = ["database_errors"]

import logging
from collections.abc import AsyncIterator
from http import HTTPStatus

from fastapi import HTTPException, Request

from ...plumbing.sql.errors import DatabaseError

logger = logging.getLogger(__name__)
_RETRY_AFTER_SECONDS = 10


async def database_errors(request: Request) -> AsyncIterator[None]:
    """A dependency of routers. The answer does not have the driver's words, which tell users and hosts.

    Raises:
        HTTPException: 503, in place of a `DatabaseError`. DiracX's own handler would log a traceback.
    """
    try:
        yield
    except DatabaseError as error:
        logger.warning("%s %s: %s", request.method, request.url.path, error.detail)
        headers = {"Retry-After": str(_RETRY_AFTER_SECONDS)}
        raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, str(error), headers) from error
