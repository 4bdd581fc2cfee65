"""Metrics of a worker or a scheduler: at `--metrics-port`, and through OpenTelemetry where it is set up."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

from ...plumbing._util.telemetry import is_collected
from ..errors import CliError
from .probes import probes

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from ...operations.families import Family, Histogram
    from ...operations.health import Health
    from ...plumbing.persistence import TaskDB
    from ...plumbing.worker.reporter import Reporter

logger = logging.getLogger(__package__)

Measured: TypeAlias = "list[Family | Histogram]"

TELEMETRY_VARIABLE = "DIRACX_OTEL_ENABLED"


def set_up_telemetry(component: str) -> None:
    """Send metrics, traces and logs to the collector of DiracX's settings (`DIRACX_OTEL_…`), where they say so,
    SQL statements included.

    Raises:
        CliError: when they do, and it is not possible.
    """
    if not os.environ.get(TELEMETRY_VARIABLE):
        return
    try:
        from diracx.core.otel import configure_otel

        if (providers := configure_otel(component)) is not None:
            from diracx.db.sql import instrument_sqlalchemy

            instrument_sqlalchemy(providers.tracer_provider, providers.meter_provider)
    except (ImportError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise CliError(
            f"OpenTelemetry cannot be set up: {said}; unset {TELEMETRY_VARIABLE} to do without"
        ) from error


@asynccontextmanager
async def measured(
    host: str,
    port: int | None,
    ready: Callable[[], bool],
    collect: Callable[[], Awaitable[Measured]],
    reporter: Reporter | None = None,
    alerts: Callable[[], Sequence[str]] = tuple,
) -> AsyncIterator[None]:
    """Tell what is collected inside the block, to whoever wants it.

    Raises:
        CliError: when the port cannot be had.
    """

    async def text() -> str:
        from ...operations.families import as_text

        return as_text(await collect())

    async with AsyncExitStack() as stack:
        await stack.enter_async_context(probes(host, port, ready, text, alerts))
        if is_collected():
            from ...operations.otel import exported

            await stack.enter_async_context(exported(collect, reporter))
        yield


@asynccontextmanager
async def costly_sources(
    port: int | None, redis: Redis
) -> AsyncIterator[tuple[Callable[[], Awaitable[Measured]], Callable[[], Awaitable[Health | None]]]]:
    """What is measured in databases, and what the health checks find. Nothing where nobody asks.

    Raises:
        CliError: a threshold of the health checks is wrong.
    """
    if port is None and not is_collected():

        async def nothing() -> Measured:
            return []

        async def nobody() -> None:
            return None

        yield nothing, nobody
        return
    from ...operations.collectors import sources
    from ...operations.health import health_checks
    from ...plumbing.exceptions import TaskConfigError

    async with AsyncExitStack() as stack:
        task_db = await stack.enter_async_context(_task_db())
        found = await stack.enter_async_context(sources(task_db))
        try:
            checks = await stack.enter_async_context(health_checks(redis, task_db))
        except TaskConfigError as error:
            raise CliError(str(error)) from error

        async def ask() -> Measured:
            return [*await found.families()]

        yield ask, checks.run


@asynccontextmanager
async def _task_db() -> AsyncIterator[TaskDB | None]:
    """The database of dead letters, where one is configured; a scheduler does its work without."""
    from .environment import TASK_DB_VARIABLE, required_task_db

    async with AsyncExitStack() as stack:
        database: TaskDB | None = None
        if os.environ.get(TASK_DB_VARIABLE):
            try:
                database = await stack.enter_async_context(required_task_db())
            except CliError as error:
                logger.warning("dead letters are not counted: %s", error)
        yield database
