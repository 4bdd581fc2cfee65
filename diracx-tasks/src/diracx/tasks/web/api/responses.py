"""What routes may answer beside what was asked for, as OpenAPI has it; for those of extensions as well."""

from __future__ import annotations

__all__ = ["QuietRoute", "responses"]

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

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

    What was sent may be long, secret, or no text that JSON can hold (half of a character): 422, not 500.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As of `APIRoute`."""
        handle = super().get_route_handler()

        async def quiet(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                problems = [{name: each[name] for name in ("type", "loc", "msg")} for each in error.errors()]
                raise RequestValidationError(problems) from error

        return quiet
