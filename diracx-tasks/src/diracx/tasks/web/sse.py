"""Server-sent events: send the live part of a page whenever it has changed."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from starlette.responses import PlainTextResponse, Response, StreamingResponse

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """Settings of the updates of live pages."""

    poll_seconds: float = 2.0
    """Interval at which the live part of a page is made again; equal pages share it."""
    keepalive_seconds: float = 15.0
    """Longest time in which nothing is sent: proxies cut off what is silent."""
    session_check_seconds: float = 15.0
    """Interval at which it is checked that the session is not over."""
    max_seconds: float = 3600.0
    """A stream ends after that, and the browser begins another: a server that stops waits for streams."""
    max_streams: int = 40
    """Live pages of one principal at a time."""

    @property
    def shared_seconds(self) -> float:
        """Time for which equal pages share an answer: each poll finds a new one."""
        return 0.9 * self.poll_seconds


def event(name: str, data: str) -> str:
    """One event of a stream."""
    lines = "".join(f"data: {line}\n" for line in data.splitlines() or [""])
    return f"event: {name}\n{lines}\n"


class _Stream(StreamingResponse):
    """One live page of a principal, counted for as long as it is open."""

    def __init__(self, events: AsyncIterator[str], name: str, streams: Counter[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._name = name
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._streams[self._name] += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._streams[self._name] -= 1
            self._streams += Counter()  # forgets those that have none


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePage:
    """Stream of events to a browser that shows a live page."""

    fragment: Callable[[], Awaitable[str]]
    """Renders the part that changes."""
    charts: Callable[[], Awaitable[dict[str, Any]]] | None
    still_allowed: Callable[[], Awaitable[bool]]
    """True if the session is valid; a `gone` event ends the stream when it is not."""
    explained: Callable[[Exception], str]
    """The text of an error, for users."""
    closing: asyncio.Event
    """Ends all streams."""
    settings: StreamSettings

    def response(self, request: Request, streams: Counter[str]) -> Response:
        """Send `fragment` and `charts` events, and `problem` when they cannot be had.

        Args:
            streams: how many each principal has open: each holds a connection, and polls.
        """
        name, most = request.state.principal.name, self.settings.max_streams
        if streams[name] >= most:
            text = f"{name} has {most} live pages open: close one"
            return PlainTextResponse(text, HTTPStatus.TOO_MANY_REQUESTS)
        return _Stream(self._events(), name, streams)

    async def _events(self) -> AsyncIterator[str]:
        yield "retry: 500\n\n"
        sent: dict[str, str] = {}
        settings = self.settings
        began = checked = spoke = time.monotonic()
        while not self.closing.is_set() and time.monotonic() - began < settings.max_seconds:
            now = time.monotonic()
            if now - checked > settings.session_check_seconds:
                checked = now
                if not await self.still_allowed():
                    yield event("gone", "your session is over")
                    return
            try:
                news = {"fragment": await self.fragment(), "problem": ""}
                if self.charts is not None:
                    news["charts"] = json.dumps(await self.charts())
            except Exception as error:
                news = {"problem": self.explained(error)}
            for name, data in news.items():
                if sent.get(name, "" if name == "problem" else None) != data:
                    sent[name] = data
                    spoke = now
                    yield event(name, data)
            if now - spoke > settings.keepalive_seconds:
                spoke = now
                yield ": still here\n\n"
            with suppress(TimeoutError):
                async with asyncio.timeout(settings.poll_seconds):
                    await self.closing.wait()
