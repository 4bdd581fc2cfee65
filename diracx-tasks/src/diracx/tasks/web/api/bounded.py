"""Routes that read no more of a request than they can need; for those of extensions as well."""

from __future__ import annotations

__all__ = ["MAX_BODY_BYTES", "BoundedRoute"]

from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi import HTTPException

from .responses import QuietRoute

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

MAX_BODY_BYTES = 1_000_000


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
