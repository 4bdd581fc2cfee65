"""Metrics of a worker or a scheduler: at `--metrics-port`, and through OpenTelemetry where it is set up."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

from ..plumbing.telemetry import is_collected
from .errors import CliError
from .probes import probes

if TYPE_CHECKING:
    from ..monitor.families import Family, Histogram
    from ..plumbing.persistence import TaskDB
    from ..plumbing.worker.reporter import Reporter

logger = logging.getLogger(__package__)

Measured: TypeAlias = "list[Family | Histogram]"

TELEMETRY_VARIABLE = "DIRACX_OTEL_ENABLED"


def set_up_telemetry(component: str) -> None:
    """Send metrics, traces and logs to the collector of DiracX's settings (`DIRACX_OTEL_…`), where they say so.

    Raises:
        CliError: when they do, and it is not possible.
    """
    if not os.environ.get(TELEMETRY_VARIABLE):
        return
    try:
        from diracx.core.otel import configure_otel

        configure_otel(component)
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
) -> AsyncIterator[None]:
    """Tell what is collected inside the block, to whoever wants it.

    Raises:
        CliError: when the port cannot be had.
    """

    async def text() -> str:
        from ..monitor.families import as_text

        return as_text(await collect())

    async with AsyncExitStack() as stack:
        await stack.enter_async_context(probes(host, port, ready, text))
        if is_collected():
            from ..monitor.exporting import exported

            await stack.enter_async_context(exported(collect, reporter))
        yield


@asynccontextmanager
async def costly_sources(port: int | None) -> AsyncIterator[Callable[[], Awaitable[Measured]]]:
    """What is measured in databases: dead letters, and what other distributions add. Nothing where nobody asks."""
    if port is None and not is_collected():

        async def nothing() -> Measured:
            return []

        yield nothing
        return
    from ..monitor.sources import sources

    async with _task_db() as task_db, sources(task_db) as found:

        async def ask() -> Measured:
            return [*await found.families()]

        yield ask


@asynccontextmanager
async def _task_db() -> AsyncIterator[TaskDB | None]:
    """The database of dead letters, where one is configured; a scheduler does its work without."""
    from .services import TASK_DB_VARIABLE, required_task_db

    async with AsyncExitStack() as stack:
        database: TaskDB | None = None
        if os.environ.get(TASK_DB_VARIABLE):
            try:
                database = await stack.enter_async_context(required_task_db())
            except CliError as error:
                logger.warning("dead letters are not counted: %s", error)
        yield database
