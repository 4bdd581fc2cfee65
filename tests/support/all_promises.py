"""Conformance tests run concurrently, for slow sites."""

from __future__ import annotations

__all__ = ["AllPromises"]

import asyncio
import inspect
import traceback
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path

from gubbins.testing.ce_conformance import CERemoteConformance


class AllPromises(CERemoteConformance):
    """Not collected: its tests are all run by `broken`, and not one by one.

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

    async def broken(self) -> str:
        """Run all promises and return the tracebacks of the broken ones."""
        promises = [getattr(self, name) for name in dir(self) if name.startswith("test_")]
        wanted = {promise: inspect.signature(promise).parameters.keys() - {"make"} for promise in promises}
        assert self._disturbance.keys() <= set().union(*wanted.values())
        broken = await asyncio.gather(*(self._broken(promise) for promise, names in wanted.items() if not names))
        for promise, names in wanted.items():
            for name in names:
                broken.append(await self._broken(promise, **{name: self._disturbance.get(name, lambda: None)()}))
        return "\n".join(broken).strip()

    async def _broken(
        self, promise: Callable[..., Awaitable[None]], **disturbance: AbstractContextManager[object] | None
    ) -> str:
        try:
            if "make" in inspect.signature(promise).parameters:
                await promise(make=self.make_backend, **disturbance)
            else:
                await promise(**disturbance)
        except Exception:
            return f"{promise}:\n{traceback.format_exc()}"
        return ""
