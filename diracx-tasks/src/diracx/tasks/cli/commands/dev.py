"""`dev`: run server, scheduler and workers in one terminal for development."""

from __future__ import annotations

import asyncio
import shlex
import signal
import socket
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ...plumbing._util.printable import printable
from ...plumbing.enums import Size
from ...testing.server import EmbeddedServerError, embedded_redis
from ..errors import CliError, UsageProblem
from ..options import LogLevel, LogLevelOption, ModuleOption
from ..runtime.registry import load_registry
from ..runtime.supervisor import Child, ChildFailedError, Supervisor

#: Time for components to stop after the grace period of running tasks.
_STOP_SECONDS = 15.0
_GRACE_SECONDS = 30.0
_COLOURS = {"dev": "bold", "scheduler": "magenta", "small": "green", "medium": "cyan", "large": "yellow"}


def dev(
    module: ModuleOption = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the embedded server; a free one by default.")
    ] = None,
    max_concurrent_tasks: Annotated[
        int, typer.Option(min=1, help="Maximum number of tasks that each worker runs at a time.")
    ] = 10,
    log_level: LogLevelOption = None,
) -> None:
    """Run an embedded Valkey, the scheduler and one worker per size in this terminal until Ctrl-C.

    The server is empty at the start, and its data are deleted at the end. Not for production.

    Example: diracx-task-run dev --module my_tasks.py
    """
    load_registry(module)  # reports a mistake in a module once, not once per component
    if port is not None:
        _check_free(port)
    try:
        asyncio.run(_run(port, _components(module or (), max_concurrent_tasks, log_level), module or ()))
    except EmbeddedServerError as error:
        raise CliError(str(error)) from error


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UsageProblem(f"--port {port} cannot be used: {error.strerror}; choose another") from error


def _components(
    modules: Sequence[str], max_concurrent_tasks: int, log_level: LogLevel | None
) -> list[list[Child]]:
    """Make the stages of the supervisor: the scheduler, which stops first, and the workers."""
    common = [part for module in modules for part in ("--module", module)]
    common += [] if log_level is None else ["--log-level", log_level]
    common_of_workers = ["--max-concurrent-tasks", str(max_concurrent_tasks), "--grace", f"{_GRACE_SECONDS:g}"]
    return [
        [Child("scheduler", ["scheduler", *common])],
        [Child(size, ["worker", "--worker-size", size, *common_of_workers, *common]) for size in Size],
    ]


async def _run(port: int | None, components: list[list[Child]], modules: Sequence[str]) -> None:
    """Run until a signal, or until a component cannot start."""
    console = Console(highlight=False, soft_wrap=True)

    def show(name: str, line: str) -> None:
        """Print a line of a component; stop if the terminal is closed."""
        try:
            console.print(Text.assemble((f"{name:<9} │ ", _COLOURS[name]), printable(line)))
        except (OSError, SystemExit):  # Rich exits the process
            console.quiet = True
            supervisor.stop()

    supervisor = Supervisor(
        components,
        partial(show, "dev"),
        every_child_must_start=True,
        output=show,
        kill_after_seconds=_GRACE_SECONDS + _STOP_SECONDS,
    )
    supervisor.handle_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with embedded_redis(port=port) as url:
        show("dev", f"Valkey at {url}; in other terminals:")
        show("dev", f"  export DIRACX_TASKS_REDIS_URL={url}")
        with_modules = "".join(f" --module {shlex.quote(module)}" for module in modules)
        show("dev", f"  diracx-task-run submit CATEGORY:TASK --wait{with_modules}")
        try:
            await supervisor.run({"DIRACX_TASKS_REDIS_URL": url, "PYTHONUNBUFFERED": "1"})
        except ChildFailedError as error:
            raise CliError(f"{error}; see its output above") from error
    show("dev", "stopped")
