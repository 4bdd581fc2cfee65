"""`status`: the health of the system, once, repeatedly, or for Nagios."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from ...operations import Snapshot
from ...operations.health import Health, health_checks
from ...operations.masking import masked_json
from ...operations.views import QUEUES, age, mebibytes
from ...plumbing.broker import RedisStreamBroker
from ...plumbing.exceptions import TaskConfigError
from ..errors import CliError, one_line
from ..options import JsonOption
from ..output import console, echo, echo_json, styled, table
from ..runtime.databases import unchecked_task_db
from ..runtime.server import Server

_STYLES = {"critical": "bold red", "warning": "bold yellow", "unknown": "bold magenta"}
_DELAY_REASONS = {
    "at_time": "until their time",
    "retry": "for a retry",
    "lock": "behind locks",
    "rate": "for quota",
}


def status(
    *,
    watch: Annotated[
        bool, typer.Option("--watch", help="Repeat it until Ctrl-C; with --json, a line each time.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.2, metavar="SECONDS", help="With --watch: how often.")] = 2.0,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Exit as Nagios has it: 0 ok, 1 warning, 2 critical, 3 unknown; prints what is wrong."
        ),
    ] = False,
    as_json: JsonOption = False,
    server: Server,
) -> None:
    """Show the health of the system: alerts of the health checks, queues, workers, delayed tasks.

    Costs the server little, however much is queued. Databases are those of DIRACX_DB_URL_<NAME>. Exits with 0 even
    when something is wrong, but for --check.

    Example: diracx-task-run status --check
    """
    if check:
        raise typer.Exit(_check(server, as_json))

    async def show(broker: RedisStreamBroker) -> None:
        async with _health_checks(broker) as run_checks:
            await _show(run_checks, every if watch else None, as_json)

    try:
        server.run(show)
    except KeyboardInterrupt:
        if not watch:
            raise


def _check(server: Server, as_json: bool) -> int:
    async def run_once() -> Health:
        # The server is not tried before: that it does not answer is for the checks to say.
        broker = RedisStreamBroker(server.url)
        try:
            async with _health_checks(broker) as run_checks:
                return await run_checks()
        finally:
            await broker.shutdown()

    try:
        health = asyncio.run(run_once())
    except Exception as error:  # any other exit code would say something about the system
        echo(f"UNKNOWN - {one_line(str(error)) or type(error).__name__}")
        return 3
    if as_json:
        echo_json(_as_json(health), indent=2)
    else:
        for line in _check_lines(health):
            echo(line)
    return health.severity.exit_code


@asynccontextmanager
async def _health_checks(broker: RedisStreamBroker) -> AsyncIterator[Callable[[], Awaitable[Health]]]:
    """Runs the health checks: of this server, and of the databases of the environment.

    Raises:
        CliError: a variable of a database or a threshold is wrong.
    """
    async with AsyncExitStack() as stack:
        task_db = await stack.enter_async_context(unchecked_task_db())
        try:
            checks = await stack.enter_async_context(health_checks(broker.redis, task_db))
        except TaskConfigError as error:
            raise CliError(str(error)) from error
        yield checks.run


async def _show(run_checks: Callable[[], Awaitable[Health]], every: float | None, as_json: bool) -> None:
    """Show the health once, or every so many seconds."""
    shown = console()
    async with AsyncExitStack() as stack:
        screen: Live | None = None
        if every is not None and shown.is_terminal and not as_json:
            screen = stack.enter_context(Live(console=shown, screen=True, auto_refresh=False))
        while True:
            health = await run_checks()
            if as_json:
                echo_json(_as_json(health), indent=2 if every is None else None)
            elif screen is None:
                shown.print(_page(health))
            else:
                screen.update(_page(health), refresh=True)
            if every is None:
                return
            await asyncio.sleep(every)


def _as_json(health: Health) -> dict[str, Any]:
    shown: dict[str, Any] = masked_json(health.as_json())
    return shown


def _check_lines(health: Health) -> list[str]:
    """As Nagios wants it: the state and the worst alert on the first line, then all of them."""
    alerts = [f"{alert.severity.upper()}: {one_line(alert.summary)}" for alert in health.alerts]
    worst = one_line(health.alerts[0].summary) if health.alerts else "all health checks are well"
    more = f" (and {len(alerts) - 1} more)" if len(alerts) > 1 else ""
    return [f"{health.severity.upper()} - {worst}{more}", *alerts[: len(alerts) if more else 0]]


def _page(health: Health) -> RenderableType:
    """The alerts with their remedies, and the figures of the system."""
    seen = health.snapshot
    now = datetime.now(UTC) if seen is None else seen.at
    lines: list[RenderableType] = [Text(f"{now:%Y-%m-%d %H:%M:%S} UTC", style="bold")]
    for alert in health.alerts:
        seconds = 0.0 if alert.since is None else (now - alert.since).total_seconds()
        lasts = f" for {age(seconds)}" if seconds >= 1 else ""
        lines.append(styled(f"! {alert.summary}", _STYLES[alert.severity]))
        lines.append(Text(f"  {alert.severity}{lasts}: {one_line(alert.remedy)}"))
    if not health.alerts:
        lines.append(Text("all is well" + (", as far as is checked" if health.unchecked else ""), style="green"))
    lines += [styled(f"not checked: {each}", "dim") for each in health.unchecked]
    if seen is not None:
        lines += [Text(), *_figures(seen)]
    return Group(*lines)


def _figures(seen: Snapshot) -> list[RenderableType]:
    alive = [worker for worker in seen.workers if worker.alive]
    slots = sum(worker.slots or 0 for worker in alive)
    used = sum(worker.slots_used or 0 for worker in alive)
    limit = "" if seen.memory_limit_bytes is None else f" of {mebibytes(seen.memory_limit_bytes)}"
    delayed = ", ".join(f"{number} {_DELAY_REASONS[reason]}" for reason, number in seen.delayed.items() if number)
    return [
        table(QUEUES, seen.queues),
        Text(),
        Text(f"workers      {len(alive)}, {used} of {slots} slots in use"),
        Text(f"delayed      {delayed or 'nothing'}"),
        Text(f"schedules    {seen.schedules}, {'a scheduler leads' if seen.scheduler_leads else 'nobody leads'}"),
        Text(f"groups       {seen.groups} have not called back"),
        Text(f"Redis        {mebibytes(seen.memory_bytes)}{limit}"),
    ]
