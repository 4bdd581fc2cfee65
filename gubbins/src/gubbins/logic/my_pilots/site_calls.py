"""Limits of synchronous calls to sites, made while a user's HTTP request waits.

All routes and dashboard pages call sites through this module. Calls beyond a limit are refused, not queued.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from gubbins.db.sql import MyPilotDB
from gubbins.domain.exceptions import GubbinsError, SiteBusyError

from .outputs import fetch_output, stored_output
from .pilots import cancel_pilot, get_pilot
from .request_rate import RequestRate
from .submission import submit_pilot

_OUTPUT_SECONDS = 5.0
_MAX_OUTPUTS = 16


@dataclass(frozen=True)
class Limit:
    """Limit of concurrent calls, and of calls started in any minute."""

    concurrent: int
    per_minute: int


class _SharedFetch(NamedTuple):
    task: asyncio.Task[dict[str, Any] | GubbinsError]
    started_at: float


class SiteCalls:
    """Counts and limits the calls of one process.

    Args:
        user: limit per user.
        ce: limit per compute element.
        process: limit of all calls.
    """

    def __init__(
        self,
        user: Limit = Limit(concurrent=4, per_minute=60),
        ce: Limit = Limit(concurrent=8, per_minute=240),
        process: Limit = Limit(concurrent=32, per_minute=1_200),
    ) -> None:
        self._limits = {"user": user, "compute element": ce, "process": process}
        self._rates = {kind: RequestRate(kind, limit.per_minute) for kind, limit in self._limits.items()}
        self._running: Counter[tuple[str, str]] = Counter()
        self._outputs: dict[int, _SharedFetch] = {}

    async def submit(self, db: MyPilotDB, ce_name: str, vo: str, *, user: str) -> int:
        """Submit a pilot; see `submit_pilot`.

        Raises:
            SiteBusyError: a limit is reached; nothing was reserved.
        """
        with self._call(ce_name, user):
            return await submit_pilot(db, ce_name, vo)

    async def cancel(self, db: MyPilotDB, pilot_id: int, *, by: str, user: str) -> dict[str, Any]:
        """Cancel a pilot; see `cancel_pilot`. Beyond a limit, the next check sends the cancellation."""
        pilot = await get_pilot(db, pilot_id)
        with contextlib.suppress(SiteBusyError), self._call(pilot["ce_name"], user):
            return await cancel_pilot(db, pilot_id, by=by)
        return await cancel_pilot(db, pilot_id, by=by, send_now=False)

    async def output(self, db: MyPilotDB, pilot_id: int, *, user: str) -> dict[str, Any]:
        """Fetch the output of a pilot; see `get_pilot_output`.

        Requests for the same pilot within some seconds share one response or error.

        Raises:
            SiteBusyError: a limit is reached.
        """
        pilot = await get_pilot(db, pilot_id)
        if (stored := await stored_output(db, pilot)) is not None:
            return stored
        now = time.monotonic()
        fetch = self._outputs.get(pilot_id)
        if fetch is None or (fetch.task.done() and now - fetch.started_at > _OUTPUT_SECONDS):
            with contextlib.ExitStack() as stack:
                stack.enter_context(self._call(pilot["ce_name"], user))
                fetch = _SharedFetch(asyncio.create_task(self._fetch(db, pilot, stack.pop_all())), now)
            self._outputs[pilot_id] = fetch
            while len(self._outputs) > _MAX_OUTPUTS:
                del self._outputs[next(iter(self._outputs))]
        output = await asyncio.shield(fetch.task)
        if isinstance(output, GubbinsError):
            raise output
        return output

    async def _fetch(
        self, db: MyPilotDB, pilot: dict[str, Any], call: contextlib.ExitStack
    ) -> dict[str, Any] | GubbinsError:
        with call:
            try:
                return await fetch_output(db, pilot)
            except GubbinsError as error:
                return error

    @contextlib.contextmanager
    def _call(self, ce_name: str, user: str) -> Iterator[None]:
        keys = {"user": user, "compute element": ce_name, "process": ""}
        for kind, name in keys.items():
            limit = self._limits[kind]
            if self._running[kind, name] >= limit.concurrent:
                raise SiteBusyError(kind, f"{limit.concurrent} at once", 1)
            if wait := self._rates[kind].wait_seconds(name):
                raise SiteBusyError(kind, f"{limit.per_minute} a minute", wait)
        for kind, name in keys.items():
            self._rates[kind].count(name)
        call = Counter(keys.items())
        self._running += call
        try:
            yield
        finally:
            self._running -= call


#: By event loop: an application has one, tests have many.
_by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, SiteCalls] = WeakKeyDictionary()


async def site_calls() -> SiteCalls:
    """Return the `SiteCalls` of this process."""
    return _by_loop.setdefault(asyncio.get_running_loop(), SiteCalls())
