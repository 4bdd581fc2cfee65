"""Error responses of routes, also of extensions: status codes, bounded bodies, database errors."""

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
from redis.exceptions import RedisError

from ...plumbing.sql.errors import DatabaseError

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

#: For users; the error has the address of the server.
BROKER_AWAY = "the broker does not respond; the log of this application has the reason"
MAX_BODY_BYTES = 1_000_000
_RETRY_AFTER_SECONDS = 10

_MEANING = {
    401: "The token is missing or invalid",
    403: "The token's VO or properties do not allow this",
    404: "No object of this name or id",
    429: "Too many actions; `Retry-After` has the seconds to wait",
    409: "Not possible in the current state",
    503: "No broker is configured, or it does not respond",
}


def responses(*codes: int, meaning: Mapping[int, str] | None = None) -> dict[int | str, dict[str, Any]]:
    """Describe status codes for the OpenAPI document, including 401 and 403.

    Args:
        meaning: descriptions that differ from the defaults.
    """
    meanings = {**_MEANING, **(meaning or {})}
    example = {"application/json": {"example": {"detail": "…"}}}
    return {code: {"description": meanings[code], "content": example} for code in (401, 403, *codes)}


class BoundedRoute(APIRoute):
    """Route for untrusted requests; set it as `route_class` of a router.

    It refuses bodies of more than `MAX_BODY_BYTES` with 413, as FastAPI reads the body before it checks the token.
    Its validation errors do not repeat the request in response and log: it may be long, secret, or have text that
    JSON cannot represent.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the handler of `APIRoute`."""
        handle = super().get_route_handler()

        async def quiet(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                problems = [{name: each[name] for name in ("type", "loc", "msg")} for each in error.errors()]
                where = ", ".join(".".join(map(str, each["loc"])) for each in problems)
                logger.info("%s %.200r: 422, wrong are %.200r", request.method, request.url.path, where)
                return JSONResponse({"detail": jsonable_encoder(problems)}, HTTPStatus.UNPROCESSABLE_ENTITY)

        return quiet

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request with a bounded body."""
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


async def server_errors(request: Request) -> AsyncIterator[None]:
    """Dependency of routers that converts errors of Redis and databases, which have users and hosts, to a 503.

    Raises:
        HTTPException: 503.
    """
    try:
        yield
    except (DatabaseError, RedisError) as error:
        text, detail = (str(error), error.detail) if isinstance(error, DatabaseError) else (BROKER_AWAY, error)
        logger.warning("%s %.200r: %s", request.method, request.url.path, detail)
        headers = {"Retry-After": str(_RETRY_AFTER_SECONDS)}
        raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, text, headers) from error
