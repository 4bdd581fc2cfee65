"""`dev`: a whole installation in one terminal, stopped by one Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...plumbing._util.printable import printable
from ...plumbing.enums import Size
from ..errors import CliError, UsageProblem
from ..options import LogLevel, LogLevelOption, ModuleOption

if TYPE_CHECKING:
    from rich.console import Console

    from ...testing.server import ValkeyProcess

#: How long components may take to stop, after what they run has had its grace period.
_STOP_SECONDS = 15.0
_GRACE_SECONDS = 30.0
#: A component that ends by itself sooner than this would do so for ever; a later one is started again.
_SETTLED_SECONDS = 10.0
_COLOURS = {"dev": "bold", "scheduler": "magenta", "small": "green", "medium": "cyan", "large": "yellow"}


def dev(
    module: ModuleOption = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the embedded server; a free one by default.")
    ] = None,
    max_concurrent_tasks: Annotated[
        int, typer.Option(min=1, help="How many tasks each worker runs at a time.")
    ] = 10,
    log_level: LogLevelOption = None,
) -> None:
    """Run an embedded Valkey, the scheduler and one worker per size in this terminal. Ctrl-C stops it all.

    Nothing is kept: the server is empty at the start and forgotten at the end. Not for production.

    Example: diracx-task-run dev --module my_tasks.py
    """
    from rich.console import Console

    from ..runtime.registry import load_registry

    # Here, a mistake in a module is reported once; from each component it would be reported four times.
    load_registry(module)
    if port is not None:
        _check_free(port)
    system = _System(Console(highlight=False, soft_wrap=True), module or (), port, max_concurrent_tasks, log_level)
    asyncio.run(system.run())


def _check_free(port: int) -> None:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UsageProblem(f"--port {port} cannot be used: {error.strerror}; choose another") from error


class _Guard:
    """Tells the guard process what to end and to remove, should we be killed."""

    def __init__(self) -> None:
        from ..runtime import orphan_reaper as guard

        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__], stdin=subprocess.PIPE, text=True, start_new_session=True
        )

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # somebody ended the guard: then there is none
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def dismiss(self) -> None:
        """Let it end; it removes what it was told to."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


class _System:
    """The components, in the order in which they are started; they are stopped in the same order."""

    def __init__(
        self,
        console: Console,
        modules: Sequence[str],
        port: int | None,
        max_concurrent_tasks: int,
        log_level: LogLevel | None,
    ) -> None:
        self._console = console
        self._modules = modules
        self._port = port
        common = [part for module in modules for part in ("--module", module)]
        common += [] if log_level is None else ["--log-level", log_level]
        slots = ["--max-concurrent-tasks", str(max_concurrent_tasks), "--grace", f"{_GRACE_SECONDS:g}"]
        self._commands = {"scheduler": ["scheduler", *common]} | {
            size.value: ["worker", "--worker-size", size.value, *slots, *common] for size in Size
        }
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._stop = asyncio.Event()
        self._signals = 0

    async def run(self) -> None:
        """Until a signal comes, or a component cannot live.

        Raises:
            CliError: when the server does not start, or a component ended at its start.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        directory = tempfile.mkdtemp(prefix="diracx-dev-")
        self._guard = _Guard()
        self._guard.tell(directory)
        try:
            server = self._start_server(Path(directory))
            try:
                await self._run_components(server.url)
            finally:
                server.stop()
                self._guard.tell(f"-{self._server_pid}")
        finally:
            self._guard.dismiss()
        self._say("dev", "stopped")

    def _on_signal(self) -> None:
        self._signals += 1
        self._stop.set()
        if self._signals > 1:
            self._say("dev", "once more: cancelling what runs")
            for process in self._processes.values():
                with suppress(ProcessLookupError):
                    process.terminate()

    def _start_server(self, directory: Path) -> ValkeyProcess:
        from ...testing.server import ValkeyProcess

        try:
            server = ValkeyProcess(directory, port=self._port)
            server.start()
        except RuntimeError as error:
            raise CliError(str(error)) from error
        self._server_pid = server.pid
        self._guard.tell(f"+{server.pid}")
        return server

    async def _run_components(self, url: str) -> None:
        self._say("dev", f"Valkey at {url}; in other terminals:")
        self._say("dev", f"  export DIRACX_TASKS_REDIS_URL={url}")
        modules = "".join(f" --module {module}" for module in self._modules)
        self._say("dev", f"  diracx-task-run submit CATEGORY:TASK --wait{modules}")
        environment = {**os.environ, "DIRACX_TASKS_REDIS_URL": url, "PYTHONUNBUFFERED": "1"}
        watching = [
            asyncio.create_task(self._keep_running(name, command, environment))
            for name, command in self._commands.items()
        ]
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([stopping, *watching], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stop.set()
            stopping.cancel()
            self._say("dev", "stopping")
            # No new occurrences, then no running tasks, then (by our caller) no server.
            await self._end(["scheduler"])
            await self._end([name for name in self._commands if name != "scheduler"])
            ended = await asyncio.gather(*watching, return_exceptions=True)
        for error in ended:
            if isinstance(error, BaseException):
                raise error

    async def _keep_running(self, name: str, command: Sequence[str], environment: dict[str, str]) -> None:
        """Run a component, again when it ends by itself, until we stop."""
        while not self._stop.is_set():
            started = time.monotonic()
            # Not a pipe of the process object: its `wait` waits for the pipe, too, which a process that a task has
            # left behind may hold.
            reading, writing = os.pipe()
            with os.fdopen(writing, "wb") as output:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *("-m", "diracx.tasks", *command),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=asyncio.subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for us to pass on, in our order
                )
            self._guard.tell(f"+{process.pid}")
            self._processes[name] = process
            echoing = asyncio.create_task(self._echo(name, reading))
            if self._stop.is_set():  # it was started while we were stopping
                process.terminate()
            code = await process.wait()
            self._guard.tell(f"-{process.pid}")
            del self._processes[name]
            await asyncio.wait([echoing], timeout=1)
            echoing.cancel()
            if self._stop.is_set():
                return
            if time.monotonic() - started < _SETTLED_SECONDS:
                raise CliError(f"{name} ended with exit code {code} at its start; see its output above")
            self._say("dev", f"{name} ended with exit code {code}; starting it again")

    async def _echo(self, name: str, pipe: int) -> None:
        reader = asyncio.StreamReader(limit=2**20)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(pipe, "rb")
        )
        with contextlib.closing(transport):
            while True:
                try:
                    line = await reader.readline()
                except ValueError:  # a line longer than the limit: what follows it is read again
                    continue
                if not line:
                    return
                self._say(name, line.decode(errors="replace").rstrip())

    async def _end(self, names: Sequence[str]) -> None:
        """SIGTERM, and SIGKILL for what does not end in its time."""
        deadline = time.monotonic() + _GRACE_SECONDS + _STOP_SECONDS
        for name in names:
            if process := self._processes.get(name):
                with suppress(ProcessLookupError):
                    process.terminate()
        for name in names:
            process = self._processes.get(name)
            if process is None:
                continue
            try:
                await asyncio.wait_for(process.wait(), max(0.1, deadline - time.monotonic()))
            except TimeoutError:
                self._say("dev", f"{name} does not stop: killing it")
                with suppress(ProcessLookupError):
                    process.kill()

    def _say(self, name: str, line: str) -> None:
        from rich.text import Text

        style = _COLOURS[name]
        try:
            self._console.print(Text.assemble((f"{name:<9} │ ", style), printable(line)))
        except (OSError, SystemExit):  # nobody reads us any more, and Rich would leave at once
            self._console.quiet = True
            self._stop.set()
