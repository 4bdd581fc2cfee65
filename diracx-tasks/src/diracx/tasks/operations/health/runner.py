"""Runs the health checks of the server, of the database of dead letters, and of other distributions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeAlias

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError

from ...plumbing._util.retrying import reason
from ...plumbing.broker.inspection import note_alerts
from ...plumbing.broker.server_check import obstacle, read_server
from ...plumbing.broker.stored import UnreadableKeyError, moment_of
from ...plumbing.plugins import load_plugin
from ..models import ReadModel, Snapshot
from ..single_flight import SingleFlightCache
from ..visibility import Viewer
from .alerts import Alert, Severity, counted
from .checks import CHECKS, describe, find_alerts, unusable
from .facts import Facts, read_facts
from .thresholds import HealthThresholds

if TYPE_CHECKING:
    from ...plumbing.persistence import TaskDB

logger = logging.getLogger(__name__)

#: Entry points of this group name a `HealthSource` of another distribution.
ENTRY_POINT_GROUP = "diracx.tasks_health"
RunChecks: TypeAlias = Callable[[], Awaitable[Sequence[Alert]]]
#: Function without arguments. Its context opens resources and yields a function that runs checks, at most every
#: 15 s; or None, or a line with the reason, if it is not configured.
HealthSource: TypeAlias = Callable[[], AbstractAsyncContextManager[RunChecks | str | None]]

_FRESH_SECONDS = 15.0
_RESPONSE_SECONDS = 3.0
_SERVER_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Health(ReadModel):
    """Result of all health checks at one moment."""

    alerts: list[Alert] = field(default_factory=list)
    """Alerts by descending severity."""
    unchecked: list[str] = field(default_factory=list)
    """Checks that are not configured, each with the reason."""
    snapshot: Snapshot | None = None
    """The whole system; None if the server did not respond."""
    error: Exception | None = None
    """Error of the server if it did not respond."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "alerts", sorted(self.alerts, key=lambda alert: -alert.severity.rank))

    @property
    def severity(self) -> Severity:
        """The highest severity of the alerts."""
        return self.alerts[0].severity if self.alerts else Severity.OK

    def for_viewer(self, viewer: Viewer) -> Health:
        """Reduce it for a viewer of one VO: alerts that are not public are merged by check, without names."""
        if viewer.vo is None:
            return self
        shown = [alert for alert in self.alerts if alert.public]
        private: dict[tuple[str, Severity], list[Alert]] = {}
        for alert in self.alerts:
            if not alert.public:
                private.setdefault((alert.check, alert.severity), []).append(alert)
        for (check, severity), these in private.items():
            shown.append(
                Alert(
                    check=check,
                    severity=severity,
                    summary=describe(check),
                    remedy="ask an administrator, who sees the details",
                    count=len(these),
                    since=min((each.since for each in these if each.since is not None), default=None),
                )
            )
        snapshot = None if self.snapshot is None else viewer.snapshot(self.snapshot)
        return replace(self, alerts=shown, snapshot=snapshot, unchecked=[])

    def names(self) -> list[str]:
        """Return `{severity} {check}` of each alert, without duplicates."""
        return list(dict.fromkeys(f"{alert.severity} {alert.check}" for alert in self.alerts))

    def as_json(self) -> dict[str, Any]:
        """Return the alerts and the fields of the snapshot for `json.dumps`."""
        return {
            **({} if self.snapshot is None else self.snapshot.as_json()),
            "severity": str(self.severity),
            "alerts": [alert.as_json() for alert in self.alerts],
            "unchecked": self.unchecked,
        }


class HealthChecks:
    """All health checks of one installation.

    Args:
        redis: the server.
        sources: additional checks by name of the checked resource.
        unchecked: checks that are not configured, each with the reason.
    """

    def __init__(
        self,
        redis: Redis,
        sources: dict[str, RunChecks] | None = None,
        unchecked: Sequence[str] = (),
        thresholds: HealthThresholds | None = None,
    ) -> None:
        self._redis = redis
        self._sources = sources or {}
        self._unchecked = list(unchecked)
        self._limits = thresholds or HealthThresholds()
        self._cache = SingleFlightCache()

    async def run(self) -> Health:
        """Run all checks. A check that fails results in an alert; nothing is raised."""
        alerts = [alert for part in await asyncio.gather(*map(self._run_source, self._sources)) for alert in part]
        facts: Facts | None = None
        error: Exception | None = None
        try:
            async with asyncio.timeout(_SERVER_SECONDS):
                facts = await read_facts(self._redis, self._limits)
            alerts = find_alerts(facts) + alerts
        except (RedisError, OSError, TimeoutError) as raised:
            error = raised
            alerts.append(await self._server_alert(raised))
        except Exception as raised:
            error = raised
            alerts.append(unreadable(raised))
        if facts is not None:
            alerts = await self._since(alerts)
        return Health(
            alerts=alerts,
            unchecked=self._unchecked,
            snapshot=None if facts is None else facts.seen,
            error=error,
        )

    async def _server_alert(self, error: Exception) -> Alert:
        """Make the alert for a server that does not respond or is unsupported."""
        try:
            async with asyncio.timeout(_RESPONSE_SECONDS):
                problem = obstacle(await read_server(self._redis))
        except (RedisError, OSError, TimeoutError):
            problem = None
        return _server_away_alert(error) if problem is None else unusable(problem)

    async def _run_source(self, name: str) -> list[Alert]:
        """Return the cached alerts of one source; its failure is an alert, too."""

        async def run_checks() -> list[Alert]:
            try:
                async with asyncio.timeout(_RESPONSE_SECONDS):
                    return list(await self._sources[name]())
            except Exception as error:
                logger.debug("health of %s", name, exc_info=True)
                return [_source_away_alert(name, error)]

        return await self._cache.get(name, run_checks, _FRESH_SECONDS)

    async def _since(self, alerts: list[Alert]) -> list[Alert]:
        """Set `since` of alerts without it to the time at which a process first noticed them."""
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
        except RedisError as error:
            logger.debug("alerts are not noted: %s", error)
            by_server = isinstance(error, ResponseError) and not isinstance(error, NoPermissionError)
            if not by_server or any(alert.check == "server_unusable" for alert in alerts):
                return alerts
            remedy = "see its log; free space on its disk, or start its replicas"
            return [*alerts, unusable(f"refuses writes: {reason(error)}", remedy)]
        moments = {id(alert): moment_of(ms / 1000) for alert, ms in zip(unknown, noticed, strict=True)}
        return [replace(alert, since=moments.get(id(alert), alert.since)) for alert in alerts]


def _server_away_alert(error: Exception) -> Alert:
    refused = isinstance(error, AuthenticationError | NoPermissionError)
    cause = (
        reason(error) if isinstance(error, RedisError) else str(error) or f"no reply within {_SERVER_SECONDS:g} s"
    )
    return Alert(
        check="server_away",
        severity=Severity.UNKNOWN if refused else Severity.CRITICAL,
        summary=f"Redis refuses the user: {cause}" if refused else f"Redis does not respond: {cause}",
        remedy="give its user the rights on diracx:*"
        if refused
        else "start it, or check the network; workers wait",
    )


def unreadable(error: Exception) -> Alert:
    """Make the alert for data in Redis that this version cannot read."""
    known = isinstance(error, UnreadableKeyError)
    logger.log(logging.DEBUG if known else logging.ERROR, "the health checks cannot read Redis", exc_info=error)
    return Alert(
        check="server_unreadable",
        severity=Severity.UNKNOWN,
        summary=f"data in Redis cannot be read: {error if known else f'{type(error).__name__}: {error}'}"[:300],
        remedy="install the same version everywhere, or delete the key, which will be recreated"
        if known
        else "another program or version writes to the keys diracx:*; the log has the traceback",
    )


def _source_away_alert(name: str, error: Exception) -> Alert:
    cause = (
        f"no response within {_RESPONSE_SECONDS:g} s" if isinstance(error, TimeoutError) else database_error(error)
    )
    return Alert(
        check="source_away",
        severity=Severity.UNKNOWN,
        summary=f"{name} cannot be checked: {cause}",
        remedy="check that the database runs, and its address and password",
        subject=name,
        path="/dead-letters" if name == DEAD_LETTERS else "/",
    )


def database_error(error: BaseException) -> str:
    """Format an error of a database driver on one line, without the statement and other text of SQLAlchemy."""
    cause = error.__cause__ if type(error).__name__ == "DBUnavailableError" and error.__cause__ else error
    return " ".join(str(getattr(cause, "orig", None) or cause).split())[:300] or type(cause).__name__


DEAD_LETTERS = "the database of dead letters"


@asynccontextmanager
async def health_checks(redis: Redis, task_db: TaskDB | None) -> AsyncIterator[HealthChecks]:
    """Open all health checks. A source that cannot be opened results in an alert.

    Args:
        task_db: the database of dead letters, open; None if not configured.

    Raises:
        TaskConfigError: a threshold in the environment is invalid.
    """
    thresholds = HealthThresholds.from_environment()
    sources: dict[str, RunChecks] = {}
    unchecked: list[str] = []
    if task_db is None:
        unchecked.append(f"{DEAD_LETTERS}: DIRACX_DB_URL_TASKDB is not set here")
    else:
        sources[DEAD_LETTERS] = _open_dead_letters(task_db)
    async with AsyncExitStack() as stack:
        for name, entry in sorted({entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}.items()):
            try:
                source: HealthSource = load_plugin(entry.load)
                run_checks = await stack.enter_async_context(source())
            except Exception as error:
                sources[name] = _failing(error)
                continue
            if isinstance(run_checks, str):
                unchecked.append(run_checks)
            elif run_checks is not None:
                sources[name] = run_checks
        yield HealthChecks(redis, sources, unchecked, thresholds)


def _failing(error: Exception) -> RunChecks:
    async def run_checks() -> Sequence[Alert]:
        raise error

    return run_checks


def _open_dead_letters(db: TaskDB) -> RunChecks:
    async def run_checks() -> list[Alert]:
        number, since = await db.count_open()
        if not number:
            return []
        return [
            Alert(
                check="dead_letters_open",
                public=True,
                severity=Severity.WARNING,
                summary=f"{counted(number, 'dead letter is', 'dead letters are')} open",
                remedy="fix the cause, then `diracx-task-run dlq retry` or `dlq discard`; `dlq list` lists them",
                count=number,
                since=since,
                path="/dead-letters",
            )
        ]

    return run_checks
