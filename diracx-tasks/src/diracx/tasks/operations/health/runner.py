"""Runs the health checks: those of the server, of the dead letters, and of other distributions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeAlias

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

from ...plumbing._util.retrying import reason
from ...plumbing.broker.inspection import note_alerts
from ...plumbing.broker.server_check import obstacle, read_server
from ...plumbing.broker.stored import UnreadableKeyError
from ..cursors import moment
from ..single_flight import SingleFlightCache
from .alerts import Alert, Severity, counted, worst
from .checks import CHECKS, find_alerts, unusable
from .facts import Facts, read_facts
from .report import Health
from .thresholds import HealthThresholds

if TYPE_CHECKING:
    from ...plumbing.persistence import TaskDB

logger = logging.getLogger(__name__)

#: Checks that another distribution adds: an entry point of this group names a `HealthSource`.
ENTRY_POINT_GROUP = "diracx.tasks_health"
#: A function without arguments. Its context opens what is needed and yields what makes the checks, or None (or a
#: line that says why) where they cannot be made. They are made every 15 s at most.
Ask: TypeAlias = Callable[[], Awaitable[Sequence[Alert]]]
HealthSource: TypeAlias = Callable[[], AbstractAsyncContextManager[Ask | str | None]]

_FRESH_SECONDS = 15.0
_ANSWER_SECONDS = 3.0
_SERVER_SECONDS = 5.0


class HealthChecks:
    """All health checks of one installation.

    Args:
        redis: the server.
        asks: further checks by the name of what they look at.
        unchecked: what is not looked at, and why.
    """

    def __init__(
        self,
        redis: Redis,
        asks: dict[str, Ask] | None = None,
        unchecked: Sequence[str] = (),
        thresholds: HealthThresholds | None = None,
    ) -> None:
        self._redis = redis
        self._asks = asks or {}
        self._unchecked = list(unchecked)
        self._limits = thresholds or HealthThresholds()
        self._answers = SingleFlightCache()

    async def run(self) -> Health:
        """Make all checks. What cannot be looked at is an alert; nothing is raised."""
        alerts = [alert for part in await asyncio.gather(*map(self._ask, self._asks)) for alert in part]
        facts: Facts | None = None
        error: Exception | None = None
        try:
            async with asyncio.timeout(_SERVER_SECONDS):
                facts = await read_facts(self._redis)
        except (RedisError, OSError, TimeoutError) as raised:
            error = raised
            alerts.append(await self._server_alert(raised))
        except Exception as raised:
            error = raised
            alerts.append(unreadable(raised))
        if facts is not None:
            alerts = await self._since(find_alerts(facts, self._limits) + alerts)
        alerts.sort(key=lambda alert: -alert.severity.rank)
        return Health(
            severity=worst(alerts),
            alerts=alerts,
            unchecked=self._unchecked,
            snapshot=None if facts is None else facts.seen,
            error=error,
        )

    async def _server_alert(self, error: Exception) -> Alert:
        """Alert for a server that cannot be read: it does not answer, or it is one on which nothing works."""
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                problem = obstacle(await read_server(self._redis))
        except (RedisError, OSError, TimeoutError):
            problem = None
        return _server_away(error) if problem is None else unusable(problem)

    async def _ask(self, name: str) -> list[Alert]:
        """Alerts of one source, as of some seconds ago; that it does not answer is an alert."""

        async def ask() -> list[Alert]:
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    return list(await self._asks[name]())
            except Exception as error:
                logger.debug("health of %s", name, exc_info=True)
                return [_source_away(name, error)]

        return await self._answers.get(name, ask, _FRESH_SECONDS)

    async def _since(self, alerts: list[Alert]) -> list[Alert]:
        """Since when each is so: by its data, else since it was first noticed by anybody."""
        unknown = [alert for alert in alerts if alert.since is None]
        looked_at = [
            *CHECKS,
            "server_away",
            "server_unreadable",
            "source_away",
            *{alert.check for alert in alerts},
        ]
        try:
            noticed = await note_alerts(
                self._redis, looked_at, [f"{alert.check} {alert.subject}" for alert in unknown]
            )
        except RedisError as error:  # a user that may only read
            logger.debug("alerts are not noted: %s", error)
            return alerts
        moments = {id(alert): moment(ms / 1000) for alert, ms in zip(unknown, noticed, strict=True)}
        return [replace(alert, since=moments.get(id(alert), alert.since)) for alert in alerts]


def _server_away(error: Exception) -> Alert:
    refused = isinstance(error, AuthenticationError | NoPermissionError)
    said = (
        reason(error) if isinstance(error, RedisError) else str(error) or f"no answer within {_SERVER_SECONDS:g} s"
    )
    return Alert(
        check="server_away",
        severity=Severity.UNKNOWN if refused else Severity.CRITICAL,
        summary=f"Redis cannot be asked: {said}" if refused else f"Redis does not answer: {said}",
        remedy="give its user the rights on diracx:*"
        if refused
        else "start it, or see what the network does; workers wait",
    )


def unreadable(error: Exception) -> Alert:
    """The alert for what another version, or something else, has written to Redis."""
    known = isinstance(error, UnreadableKeyError)
    logger.log(logging.DEBUG if known else logging.ERROR, "the health checks cannot read Redis", exc_info=error)
    return Alert(
        check="server_unreadable",
        severity=Severity.UNKNOWN,
        summary=f"what is in Redis cannot be read: {error if known else f'{type(error).__name__}: {error}'}"[:300],
        remedy="install the same version everywhere, or delete the key, which is written anew"
        if known
        else "something else writes to the keys diracx:*, or another version does: the log has the traceback",
    )


def _source_away(name: str, error: Exception) -> Alert:
    said = f"no answer within {_ANSWER_SECONDS:g} s" if isinstance(error, TimeoutError) else database_error(error)
    return Alert(
        check="source_away",
        severity=Severity.UNKNOWN,
        summary=f"{name} cannot be looked at: {said}",
        remedy="see whether that database runs, and whether its address and password are right",
        subject=name,
        path="/dead-letters" if name == DEAD_LETTERS else "/",
    )


def database_error(error: BaseException) -> str:
    """Error of a database driver on one line: without the statement, and what SQLAlchemy adds."""
    cause = error.__cause__ if type(error).__name__ == "DBUnavailableError" and error.__cause__ else error
    return " ".join(str(getattr(cause, "orig", None) or cause).split())[:300] or type(cause).__name__


DEAD_LETTERS = "the database of dead letters"


@asynccontextmanager
async def health_checks(redis: Redis, task_db: TaskDB | None) -> AsyncIterator[HealthChecks]:
    """All there are, opened. What cannot be opened is named among what is not looked at.

    Args:
        task_db: the database of dead letters, open; None where there is none.

    Raises:
        TaskConfigError: a threshold in the environment is wrong.
    """
    thresholds = HealthThresholds.of_environment()
    asks: dict[str, Ask] = {}
    unchecked: list[str] = []
    if task_db is None:
        unchecked.append(f"{DEAD_LETTERS}: DIRACX_DB_URL_TASKDB is not set here")
    else:
        asks[DEAD_LETTERS] = _open_letters(task_db)
    async with AsyncExitStack() as stack:
        for name, entry in sorted({entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}.items()):
            try:
                source: HealthSource = entry.load()
                ask = await stack.enter_async_context(source())
            except Exception as error:
                asks[name] = _failing(error)
                continue
            if isinstance(ask, str):
                unchecked.append(ask)
            elif ask is not None:
                asks[name] = ask
        yield HealthChecks(redis, asks, unchecked, thresholds)


def _failing(error: Exception) -> Ask:
    async def ask() -> Sequence[Alert]:
        raise error

    return ask


def _open_letters(db: TaskDB) -> Ask:
    async def ask() -> list[Alert]:
        number, since = await db.count_open()
        if not number:
            return []
        return [
            Alert(
                check="dead_letters_open",
                public=True,
                severity=Severity.WARNING,
                summary=f"{counted(number, 'dead letter is', 'dead letters are')} to be decided about",
                remedy="mend the cause, then `diracx-task-run dlq retry` or `dlq discard`; `dlq list` has them",
                count=number,
                since=since,
                path="/dead-letters",
            )
        ]

    return ask
