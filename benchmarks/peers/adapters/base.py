"""Interface of the clients of all peers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Self

#: Of the server, as `redis://127.0.0.1:port`.
URL_VARIABLE = "BENCH_REDIS_URL"
#: Set to 1 where results are to be stored.
RESULTS_VARIABLE = "BENCH_RESULTS"
NAP_SECONDS = 0.010
ALONE_SECONDS = 0.001


def redis_url() -> str:
    return os.environ.get(URL_VARIABLE, "redis://127.0.0.1:6379")


def stores_results() -> bool:
    return os.environ.get(RESULTS_VARIABLE) == "1"


class Client:
    """Submits tasks by their names in `adapters`; opened and closed by `async with`."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def submit(self, task: str, argument: Any) -> None:
        """Submit one task and wait until the server has it."""
        raise NotImplementedError

    async def submit_many(self, task: str, arguments: Iterable[Any]) -> None:
        """Submit many in the fastest way that the peer documents."""
        raise NotImplementedError

    async def submit_at(self, task: str, argument: Any, moment: float) -> None:
        """Submit one that is not to run before `moment`, in seconds since the epoch."""
        raise NotImplementedError
