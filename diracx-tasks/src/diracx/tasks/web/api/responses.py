"""Error responses of routes, for those of extensions as well: status codes, bounded bodies, databases."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException, Request, Response
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from ...plumbing.sql.errors import DatabaseError

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1_000_000
_RETRY_AFTER_SECONDS = 10

_MEANING = {
    401: "No token, or one that is not valid",
    403: "The token's VO or properties do not allow this",
    404: "There is nothing of that name or id",
    429: "You act too often; `Retry-After` says for how many seconds to wait",
    409: "Not possible as things are",
    503: "No broker is configured, or it does not answer",
}


def responses(*codes: int, meaning: Mapping[int, str] | None = None) -> dict[int | str, dict[str, Any]]:
    """Status codes with their meaning; those about tokens go without saying.

    Args:
        meaning: what they mean here, where that is something else than elsewhere.
    """
    meanings = {**_MEANING, **(meaning or {})}
    example = {"application/json": {"example": {"detail": "…"}}}
    return {code: {"description": meanings[code], "content": example} for code in (401, 403, *codes)}


class QuietRoute(APIRoute):
    """A route that says what is wrong with a request without repeating it.

    What was sent may be long, secret, or no text that JSON can hold (half of a character): 422, not 500. DiracX's
    own handler would write the whole body to the log.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As of `APIRoute`."""
        handle = super().get_route_handler()

        async def quiet(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                problems = [{name: each[name] for name in ("type", "loc", "msg")} for each in error.errors()]
                where = ", ".join(".".join(map(str, each["loc"])) for each in problems)
                logger.info("%s %s: 422, wrong are %.200r", request.method, request.url.path, where)
                return JSONResponse({"detail": jsonable_encoder(problems)}, HTTPStatus.UNPROCESSABLE_ENTITY)

        return quiet


class BoundedRoute(QuietRoute):
    """Refuses a body of more than `MAX_BODY_BYTES` with 413, before it is in memory.

    FastAPI reads a body before it asks who sends it. For the `route_class` of a router.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As of `QuietRoute`."""
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise HTTPException(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body has more than {MAX_BODY_BYTES} bytes"
                )
            return message

        await super().handle(scope, bounded, send)


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
