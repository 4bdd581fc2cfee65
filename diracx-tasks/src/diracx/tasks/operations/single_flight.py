"""Answers that all who ask for the same at about the same time share."""

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
    """How long it is good."""
    at: float | None = None
    """When it came, by the monotonic clock; None: it is being asked for."""

    def is_over(self) -> bool:
        return self.at is not None and time.monotonic() - self.at > self.seconds


class Shared:
    """Answers by key. Each is asked for once at a time, and one key does not wait for another."""

    def __init__(self) -> None:
        self._answers: dict[Hashable, _Answer] = {}

    async def get(self, key: Hashable, ask: Callable[[], Awaitable[_Value]], seconds: float) -> _Value:
        """What was answered within so many seconds, or is being asked for; else it is asked for now.

        What an ask raises, all raise who wait for it; the next one asks again. It goes on when nobody waits.
        """
        answer = self._answers.get(key)
        if answer is None or answer.is_over():
            answer = self._keep(key, asyncio.ensure_future(ask()), seconds)
        return cast("_Value", await asyncio.shield(answer.asked))

    def put(self, key: Hashable, value: object, seconds: float) -> None:
        """From now on this is the answer."""
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
