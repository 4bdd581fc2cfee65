"""Calls to sites that a user's request waits for: limited in number, and shared.

Routes and pages call sites only through here. Nothing is queued: a request that would wait for others is refused
at once, and says when to come back. Workers have limits of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from gubbins.db.sql import MyPilotDB
from gubbins.domain.exceptions import GubbinsError, SiteBusyError

from .outputs import ask_for_output, stored_output
from .pilots import cancel_pilot, get_pilot
from .submission import submit_pilot

_WINDOW_SECONDS = 60.0
_OUTPUT_SECONDS = 5.0
_OUTPUTS = 16


@dataclass(frozen=True)
class Limit:
    """Limit of calls at once, and of calls begun in any minute."""

    at_once: int
    per_minute: int


@dataclass
class _Calls:
    under_way: int = 0
    begun: deque[float] = field(default_factory=deque)

    def drop_before(self, before: float) -> None:
        while self.begun and self.begun[0] <= before:
            self.begun.popleft()


@dataclass(frozen=True)
class _Asked:
    answer: asyncio.Task[dict[str, Any] | GubbinsError]
    at: float


class SiteCalls:
    """The calls of one process (one event loop).

    Args:
        user: for one user, at all compute elements.
        ce: to one compute element, for all users.
        process: in all.
    """

    def __init__(
        self,
        user: Limit = Limit(at_once=4, per_minute=60),
        ce: Limit = Limit(at_once=8, per_minute=240),
        process: Limit = Limit(at_once=32, per_minute=1_200),
    ) -> None:
        self._limits = {"user": user, "compute element": ce, "process": process}
        self._calls: dict[tuple[str, str], _Calls] = {}
        self._outputs: dict[int, _Asked] = {}

    async def submit(self, db: MyPilotDB, ce_name: str, vo: str, *, user: str) -> int:
        """Submit a pilot; see `submit_pilot`.

        Raises:
            SiteBusyError: beyond a limit; nothing was reserved.
        """
        with self._call(ce_name, user):
            return await submit_pilot(db, ce_name, vo)

    async def cancel(self, db: MyPilotDB, pilot_id: int, *, by: str, user: str) -> dict[str, Any]:
        """Cancel a pilot; see `cancel_pilot`. Beyond a limit the next check sends it."""
        pilot = await get_pilot(db, pilot_id)
        with contextlib.suppress(SiteBusyError), self._call(pilot["ce_name"], user):
            return await cancel_pilot(db, pilot_id, by=by)
        return await cancel_pilot(db, pilot_id, by=by, send_now=False)

    async def output(self, db: MyPilotDB, pilot_id: int, *, user: str) -> dict[str, Any]:
        """Output of a pilot; see `get_pilot_output`.

        All requests for the same pilot within some seconds share one response, or one failure.

        Raises:
            SiteBusyError: beyond a limit.
        """
        pilot = await get_pilot(db, pilot_id)
        if (stored := await stored_output(db, pilot)) is not None:
            return stored
        now = time.monotonic()
        asked = self._outputs.get(pilot_id)
        if asked is None or (asked.answer.done() and now - asked.at > _OUTPUT_SECONDS):
            with contextlib.ExitStack() as stack:
                stack.enter_context(self._call(pilot["ce_name"], user))
                asked = _Asked(asyncio.create_task(self._ask(db, pilot, stack.pop_all())), now)
            self._outputs[pilot_id] = asked
            while len(self._outputs) > _OUTPUTS:
                del self._outputs[next(iter(self._outputs))]
        answer = await asyncio.shield(asked.answer)
        if isinstance(answer, GubbinsError):
            raise answer
        return answer

    async def _ask(
        self, db: MyPilotDB, pilot: dict[str, Any], call: contextlib.ExitStack
    ) -> dict[str, Any] | GubbinsError:
        with call:
            try:
                return await ask_for_output(db, pilot)
            except GubbinsError as error:
                return error

    @contextlib.contextmanager
    def _call(self, ce_name: str, user: str) -> Iterator[None]:
        now = time.monotonic()
        mine = {("user", user), ("compute element", ce_name), ("process", "")}
        for kind, name in mine:
            calls, limit = self._calls.get((kind, name), _Calls()), self._limits[kind]
            calls.drop_before(now - _WINDOW_SECONDS)
            if calls.under_way >= limit.at_once:
                raise SiteBusyError(kind, f"{limit.at_once} at once", 1)
            if len(calls.begun) >= limit.per_minute:
                wait = calls.begun[0] + _WINDOW_SECONDS - now
                raise SiteBusyError(kind, f"{limit.per_minute} a minute", max(1, round(wait)))
        for key in mine:
            calls = self._calls.setdefault(key, _Calls())
            calls.under_way += 1
            calls.begun.append(now)
        try:
            yield
        finally:
            for key in mine:
                self._calls[key].under_way -= 1
            self._drop_idle()

    def _drop_idle(self) -> None:
        before = time.monotonic() - _WINDOW_SECONDS
        for calls in self._calls.values():
            calls.drop_before(before)
        self._calls = {key: calls for key, calls in self._calls.items() if calls.under_way or calls.begun}


#: An application has one event loop; tests have many.
_of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, SiteCalls] = WeakKeyDictionary()


async def site_calls() -> SiteCalls:
    """The `SiteCalls` of this process, for routes and pages alike."""
    return _of_loop.setdefault(asyncio.get_running_loop(), SiteCalls())
