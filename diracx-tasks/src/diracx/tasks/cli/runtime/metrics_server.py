"""Metrics of a worker or a scheduler: at `--metrics-port`, and through OpenTelemetry where it is set up."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer
from prometheus_client import Metric
from redis.asyncio import Redis

from ...operations import collectors
from ...operations.health import Health, health_checks
from ...plumbing.broker.counts import is_collected
from ...plumbing.exceptions import TaskConfigError
from ...plumbing.worker.reporter import Reporter
from ..errors import CliError
from .databases import TASK_DB_VARIABLE, required_task_db
from .probes import probes

if TYPE_CHECKING:
    from ...plumbing.persistence import TaskDB

logger = logging.getLogger(__package__)

Collect: TypeAlias = "Callable[[], Awaitable[list[Metric]]]"

MetricsPortOption = Annotated[
    int | None,
    typer.Option(
        "--metrics-port",
        min=1,
        max=65535,
        help="Serve /metrics, /healthz and /readyz there; with --processes, the next ports as well.",
    ),
]
MetricsHostOption = Annotated[
    str, typer.Option("--metrics-host", metavar="ADDRESS", help="Address to serve them on: 0.0.0.0 for all.")
]
LOOPBACK = "127.0.0.1"

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
async def serve_metrics(
    host: str,
    port: int | None,
    ready: Callable[[], bool],
    collect: Collect,
    reporter: Reporter | None = None,
    alerts: Callable[[], Sequence[str]] = tuple,
) -> AsyncIterator[None]:
    """Serve metrics at the port and export them through OpenTelemetry, inside the block, where either is set up.

    Raises:
        CliError: when the port is not free.
    """
    async with AsyncExitStack() as stack:
        if port is not None:
            await stack.enter_async_context(probes(host, port, ready, collect, alerts))
        if is_collected():
            from ...operations.otel import exported

            await stack.enter_async_context(exported(collect, reporter))
        yield


@dataclass(frozen=True)
class Collectors:
    """Metrics of databases, and the health checks: expensive, and read only while metrics are collected."""

    collect: Collect
    check_health: Callable[[], Awaitable[Health]]


@asynccontextmanager
async def open_collectors(port: int | None, redis: Redis) -> AsyncIterator[Collectors | None]:
    """None where metrics are not collected: neither at a port nor through OpenTelemetry.

    Raises:
        CliError: a threshold of the health checks is wrong.
    """
    if port is None and not is_collected():
        yield None
        return

    async with AsyncExitStack() as stack:
        task_db = await stack.enter_async_context(_task_db())
        found = await stack.enter_async_context(collectors.open_collectors(task_db))
        try:
            checks = await stack.enter_async_context(health_checks(redis, task_db))
        except TaskConfigError as error:
            raise CliError(str(error)) from error
        yield Collectors(found.metrics, checks.run)


@asynccontextmanager
async def _task_db() -> AsyncIterator[TaskDB | None]:
    """The database of dead letters, where one is configured; a scheduler does its work without."""
    async with AsyncExitStack() as stack:
        database: TaskDB | None = None
        if os.environ.get(TASK_DB_VARIABLE):
            try:
                database = await stack.enter_async_context(required_task_db())
            except CliError as error:
                logger.warning("dead letters are not counted: %s", error)
        yield database
