"""Server-sent events: send the live part of a page whenever it has changed."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from starlette.responses import PlainTextResponse, Response, StreamingResponse

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

_EVERY_SECONDS = 2.0
#: Those who follow the same page share what it shows. Each finds it new whenever it looks again.
SHARED_SECONDS = 0.9 * _EVERY_SECONDS
#: Something is sent at least so often: proxies cut off what is silent.
_SIGN_OF_LIFE_SECONDS = 15.0
#: Live pages of one principal. Browsers leave those that nobody sees.
MOST_STREAMS = 40
#: Sessions end while pages are open.
_SESSION_CHECK_SECONDS = 15.0


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


def stream(
    request: Request,
    fragment: Callable[[], Awaitable[str]],
    charts: Callable[[], Awaitable[dict[str, Any]]] | None,
    still_allowed: Callable[[], Awaitable[bool]],
    explained: Callable[[Exception], str],
    closing: asyncio.Event,
    longest_seconds: float,
    streams: Counter[str],
) -> Response:
    """The live part of a page, as `fragment` and `charts` events, with `problem` when it cannot be had.

    Args:
        fragment: renders it.
        still_allowed: whether the session is good; a `gone` event ends the stream when it is not.
        explained: the text of an error, for users.
        closing: ends all streams.
        longest_seconds: ends this one; the browser begins another.
        streams: how many each principal has open: each holds a connection, and looks every two seconds.
    """
    name = request.state.principal.name
    if streams[name] >= MOST_STREAMS:
        text = f"{name} has {MOST_STREAMS} live pages open: close one"
        return PlainTextResponse(text, HTTPStatus.TOO_MANY_REQUESTS)
    events = _events(fragment, charts, still_allowed, explained, closing, longest_seconds)
    return _Stream(events, name, streams)


async def _events(
    fragment: Callable[[], Awaitable[str]],
    charts: Callable[[], Awaitable[dict[str, Any]]] | None,
    still_allowed: Callable[[], Awaitable[bool]],
    explained: Callable[[Exception], str],
    closing: asyncio.Event,
    longest_seconds: float,
) -> AsyncIterator[str]:
    yield "retry: 500\n\n"
    sent: dict[str, str] = {}
    began = checked = spoke = time.monotonic()
    while not closing.is_set() and time.monotonic() - began < longest_seconds:
        now = time.monotonic()
        if now - checked > _SESSION_CHECK_SECONDS:
            checked = now
            if not await still_allowed():
                yield event("gone", "your session is over")
                return
        try:
            news = {"fragment": await fragment(), "problem": ""}
            if charts is not None:
                news["charts"] = json.dumps(await charts())
        except Exception as error:
            news = {"problem": explained(error)}
        for name, data in news.items():
            if sent.get(name, "" if name == "problem" else None) != data:
                sent[name] = data
                spoke = now
                yield event(name, data)
        if now - spoke > _SIGN_OF_LIFE_SECONDS:
            spoke = now
            yield ": still here\n\n"
        with suppress(TimeoutError):
            async with asyncio.timeout(_EVERY_SECONDS):
                await closing.wait()
