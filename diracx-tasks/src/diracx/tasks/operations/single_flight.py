"""A cache in which equal requests at about the same time share one answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

_Value = TypeVar("_Value")


@dataclass(slots=True)
class _Answer:
    asked: asyncio.Future[Any]
    seconds: float
    """Time for which it is kept."""
    at: float | None = None
    """Time when it came, by the monotonic clock; None: it is being computed."""

    def is_over(self) -> bool:
        return self.at is not None and time.monotonic() - self.at > self.seconds


class SingleFlightCache:
    """Keeps answers by key. Each is computed once at a time, and no key waits for another."""

    def __init__(self) -> None:
        self._answers: dict[Hashable, _Answer] = {}

    async def get(self, key: Hashable, ask: Callable[[], Awaitable[_Value]], seconds: float) -> _Value:
        """Return the answer of the last so many seconds or the one that is on its way, else compute it.

        An exception of `ask` is raised by all that wait for it; the next call computes again. A computation
        goes on when its callers are cancelled.
        """
        answer = self._answers.get(key)
        if answer is None or answer.is_over():
            answer = self._keep(key, asyncio.ensure_future(ask()), seconds)
        return cast("_Value", await asyncio.shield(answer.asked))

    def put(self, key: Hashable, value: object, seconds: float) -> None:
        """Set the answer."""
        known: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        known.set_result(value)
        self._keep(key, known, seconds)

    def _keep(self, key: Hashable, asked: asyncio.Future[Any], seconds: float) -> _Answer:
        self._answers = {other: kept for other, kept in self._answers.items() if not kept.is_over()}
        answer = self._answers[key] = _Answer(asked, seconds)

        def came(_: object) -> None:
            answer.at = time.monotonic()
            if (asked.cancelled() or asked.exception() is not None) and self._answers.get(key) is answer:
                del self._answers[key]

        asked.add_done_callback(came)
        return answer
