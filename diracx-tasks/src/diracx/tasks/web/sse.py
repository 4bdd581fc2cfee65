"""Server-sent events: send the live part of a page when it has changed."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

from starlette.responses import PlainTextResponse, Response, StreamingResponse

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """Settings of event streams."""

    poll_seconds: float = 2.0
    """Interval at which the live part of a page is rendered; equal pages share it."""
    keepalive_seconds: float = 15.0
    """Interval of keep-alive events: proxies close idle connections, and browsers notice a lost one."""
    session_check_seconds: float = 15.0
    """Interval at which the session is checked."""
    max_seconds: float = 3600.0
    """Maximum duration of a stream, after which the browser reconnects: a stopping server waits for streams."""
    max_streams: int = 40
    """Maximum number of concurrent streams of one principal."""

    @property
    def shared_seconds(self) -> float:
        """Time for which equal pages share a rendering; less than a poll interval."""
        return 0.9 * self.poll_seconds


def event(name: str, data: str) -> str:
    """Format one event."""
    lines = "".join(f"data: {line}\n" for line in data.splitlines() or [""])
    return f"event: {name}\n{lines}\n"


class _CountedStream(StreamingResponse):
    """Response of one stream, counted while it is open."""

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
            self._streams += Counter()  # removes names with a count of 0


class EventStreams:
    """The event streams of a dashboard."""

    def __init__(self, settings: StreamSettings) -> None:
        self.settings = settings
        self.closing = asyncio.Event()
        """Ends all streams."""
        self.open: Counter[str] = Counter()
        """Number of open streams by user."""

    def response(
        self, user: str, render: Callable[[], Awaitable[dict[str, str]]], is_allowed: Callable[[], Awaitable[bool]]
    ) -> Response:
        """Send the events of a page when their data have changed.

        Args:
            user: name of the principal, whose number of streams is limited.
            render: returns names and data of the events.
            is_allowed: checks the session; if it is invalid, a `gone` event ends the stream.
        """
        most = self.settings.max_streams
        if self.open[user] >= most:
            text = f"{user} has {most} live pages open, which is the maximum: close one"
            return PlainTextResponse(text, HTTPStatus.TOO_MANY_REQUESTS)
        return _CountedStream(self._events(render, is_allowed), user, self.open)

    async def _events(
        self, render: Callable[[], Awaitable[dict[str, str]]], is_allowed: Callable[[], Awaitable[bool]]
    ) -> AsyncIterator[str]:
        yield "retry: 500\n\n"
        sent = {"problem": ""}
        settings = self.settings
        began = checked = last_sent = time.monotonic()
        while not self.closing.is_set() and time.monotonic() - began < settings.max_seconds:
            now = time.monotonic()
            if now - checked > settings.session_check_seconds:
                checked = now
                if not await is_allowed():
                    yield event("gone", "your session has expired")
                    return
            for name, data in (await render()).items():
                if sent.get(name) != data:
                    sent[name] = data
                    last_sent = now
                    yield event(name, data)
            if now - last_sent > settings.keepalive_seconds:
                last_sent = now
                yield event("alive", "")
            with suppress(TimeoutError):
                async with asyncio.timeout(settings.poll_seconds):
                    await self.closing.wait()
