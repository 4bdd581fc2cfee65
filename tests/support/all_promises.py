"""Conformance tests run concurrently, for slow sites."""

from __future__ import annotations

__all__ = ["AllPromises"]

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path

from gubbins.testing.ce_conformance import CERemoteConformance


class AllPromises(CERemoteConformance):
    """Not collected: its tests are all run by `check`, and not one by one.

    Args:
        witness: a directory in which each start of a pilot leaves a line, in the file named by its stamp.
        disturbance: the contexts in which the site is `down`, and `hanging`.
    """

    deadline_seconds = 180
    pause_seconds = 2  # each poll opens a connection, or starts a program

    def __init__(self, witness: Path, **disturbance: Callable[[], AbstractContextManager[object]]) -> None:
        self._witness = witness
        self._disturbance = disturbance

    def starts(self, stamp: str) -> int:
        return len((self._witness / stamp).read_text().splitlines())

    async def check(self) -> None:
        """Check all promises.

        Raises:
            ExceptionGroup: errors of the broken ones.
        """
        promises = [getattr(self, name) for name in dir(self) if name.startswith("test_")]
        wanted = {promise: inspect.signature(promise).parameters.keys() - {"make"} for promise in promises}
        assert self._disturbance.keys() <= set().union(*wanted.values())
        errors = await asyncio.gather(*(self._error(promise) for promise, names in wanted.items() if not names))
        for promise, names in wanted.items():
            for name in names:
                errors.append(await self._error(promise, **{name: self._disturbance.get(name, lambda: None)()}))
        if broken := [error for error in errors if error is not None]:
            raise ExceptionGroup("broken promises", broken)

    async def _error(
        self, promise: Callable[..., Awaitable[None]], **disturbance: AbstractContextManager[object] | None
    ) -> Exception | None:
        make = {"make": self.make_backend} if "make" in inspect.signature(promise).parameters else {}
        try:
            await promise(**make, **disturbance)
        except Exception as error:
            return error
        return None
