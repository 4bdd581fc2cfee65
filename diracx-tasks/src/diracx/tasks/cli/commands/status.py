"""`status`: show the health of the system, once, repeatedly, or for Nagios."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from ...operations.formats import duration, size
from ...operations.health import Health, health_checks
from ...operations.views import QUEUES
from ...plumbing._util.passwords import mask
from ...plumbing.broker import RedisStreamBroker
from ..errors import one_line
from ..options import JsonOption
from ..output import console, echo, print_json, report, styled, table
from ..runtime.databases import unchecked_task_db
from ..runtime.server import Server

_STYLES = {"critical": "bold red", "warning": "bold yellow", "unknown": "bold magenta"}
_DELAY_REASONS = {
    "at_time": "until their time",
    "retry": "for a retry",
    "lock": "for locks",
    "rate": "for quota",
}


def status(
    *,
    watch: Annotated[
        bool, typer.Option("--watch", help="Repeat it until Ctrl-C; with --json, one line per update.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.2, metavar="SECONDS", help="Interval of --watch.")] = 2.0,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Print the alerts and exit as a Nagios check: 0 ok, 1 warning, 2 critical, 3 unknown."
        ),
    ] = False,
    as_json: JsonOption = False,
    server: Server,
) -> None:
    """Show alerts of the health checks, queues, workers and delayed tasks.

    Takes a fixed number of round trips, independent of queue lengths. Checks the databases of
    DIRACX_DB_URL_<NAME>, too. Without --check it exits with 0 even if there are alerts.

    Example: diracx-task-run status --check
    """
    if check:
        raise typer.Exit(_check(server, as_json))

    terminal = console()
    on_screen = watch and terminal.is_terminal and not as_json

    async def show(broker: RedisStreamBroker) -> None:
        async with unchecked_task_db() as task_db, health_checks(broker.redis, task_db) as checks:
            with Live(console=terminal, screen=True, auto_refresh=False) if on_screen else nullcontext() as screen:
                while True:
                    health = await checks.run()
                    if as_json:
                        print_json(health.as_json(), indent=None if watch else 2)
                    elif screen is None:
                        terminal.print(Group(*_alerts(health), *_figures(health, terminal.width)))
                    else:
                        # The screen is cut at its end; alerts come and go.
                        screen.update(Group(*_figures(health, terminal.width), *_alerts(health)), refresh=True)
                    if not watch:
                        return
                    await asyncio.sleep(every)

    try:
        server.run(show)
    except KeyboardInterrupt:
        if not watch:
            raise


def _check(server: Server, as_json: bool) -> int:
    async def run_once() -> Health:
        # Not `open_broker`: the health checks report a server that does not respond.
        broker = RedisStreamBroker(server.url)
        try:
            async with unchecked_task_db() as task_db, health_checks(broker.redis, task_db) as checks:
                return await checks.run()
        finally:
            await broker.shutdown()

    try:
        health = asyncio.run(run_once())
    except Exception as error:
        echo(f"UNKNOWN - {one_line(str(error)) or type(error).__name__}")
        return 3
    where = [] if health.snapshot else [f"server: {mask(server.url)}"]
    report(health.as_json(), _check_lines(health) + where, as_json, indent=2)
    return health.severity.exit_code


def _check_lines(health: Health) -> list[str]:
    """Format the output of a Nagios check: state and worst alert on the first line, then all alerts."""
    alerts = [f"{alert.severity.upper()}: {one_line(alert.summary)}" for alert in health.alerts]
    worst = one_line(health.alerts[0].summary) if health.alerts else _no_alerts(health)
    more = f" (and {len(alerts) - 1} more)" if len(alerts) > 1 else ""
    state = f"{health.severity.upper()} - {worst}{more}"
    return [state, *alerts[: len(alerts) if more else 0], *_not_checked(health)]


def _no_alerts(health: Health) -> str:
    return "no alerts" + (", but not all checks ran" if health.unchecked else "")


def _not_checked(health: Health) -> list[str]:
    return [f"not checked: {each}" for each in health.unchecked]


def _alerts(health: Health) -> list[RenderableType]:
    """Render the time, and the alerts with their remedies."""
    now = datetime.now(UTC) if health.snapshot is None else health.snapshot.at
    lines: list[RenderableType] = [Text(f"{now:%Y-%m-%d %H:%M:%S} UTC", style="bold")]
    for alert in health.alerts:
        seconds = 0.0 if alert.since is None else (now - alert.since).total_seconds()
        lasts = f" for {duration(seconds)}" if seconds >= 1 else ""
        lines.append(styled(f"! {alert.summary}", _STYLES[alert.severity]))
        lines.append(Text(f"  {alert.severity}{lasts}: {one_line(alert.remedy)}"))
    if not health.alerts:
        lines.append(Text(_no_alerts(health), style="green"))
    lines += [styled(line, "dim") for line in _not_checked(health)]
    return lines


def _figures(health: Health, width: int) -> list[RenderableType]:
    """Render the state of the system."""
    if (seen := health.snapshot) is None:
        return []
    alive = [worker for worker in seen.workers if worker.alive]
    slots = sum(worker.slots or 0 for worker in alive)
    used = sum(worker.slots_used or 0 for worker in alive)
    limit = "" if seen.memory_limit_bytes is None else f" of {size(seen.memory_limit_bytes)}"
    delayed = ", ".join(f"{number} {_DELAY_REASONS[reason]}" for reason, number in seen.delayed.items() if number)
    return [
        Text(),
        table(QUEUES, seen.queues, width),
        Text(),
        Text(f"workers      {len(alive)}, {used} of {slots} slots in use"),
        Text(f"delayed      {delayed or 'nothing'}"),
        Text(f"schedules    {seen.schedules}, {'a' if seen.scheduler_leads else 'no'} scheduler leads"),
        Text(f"groups       {seen.groups} pending"),
        Text(f"Redis        {size(seen.memory_bytes)}{limit}"),
    ]
