"""Process supervisor of `worker --processes`, `dev` and the demo: restarts children, stops them in order.

Environment variables give a child its number and a socket to the supervisor. Over the socket the child reports
that it is ready. When the socket is closed because the supervisor has ended, the child stops as on SIGTERM.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from ...plumbing._util.tasks import cancel_and_wait

_NUMBER_VARIABLE = "DIRACX_TASKS_PROCESS_NUMBER"
_SOCKET_VARIABLE = "DIRACX_TASKS_SUPERVISOR_SOCKET"
_READY = b"r"
_LONGEST_LINE = 2**20
#: How long to read the output of a child that has ended, if another process keeps its pipe open.
_LAST_OUTPUT_SECONDS = 1.0
#: Backoff of restarts: the pause doubles each time a child ends within `_YOUNG_SECONDS`.
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
_YOUNG_SECONDS = 10.0


# --- in a child ---------------------------------------------------------------------------------------------


@cache
def _inherited(variable: str) -> int | None:
    """Return a variable of the supervisor, and remove it from the environment of subprocesses of tasks."""
    number = os.environ.pop(variable, None)
    return None if number is None else int(number)


def own_number() -> int | None:
    """Return the number of this child, from 1; None if it has none."""
    return _inherited(_NUMBER_VARIABLE)


def is_supervised() -> bool:
    """True if this process is a child of a supervisor."""
    return _inherited(_SOCKET_VARIABLE) is not None


async def report_to_supervisor(ready: asyncio.Event, on_supervisor_end: Callable[[], None]) -> None:
    """In a child: report when it is ready, and call `on_supervisor_end` when the supervisor has ended."""
    if not is_supervised():
        return
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=_inherited(_SOCKET_VARIABLE)))
    closed = asyncio.ensure_future(reader.read())
    is_ready = asyncio.ensure_future(ready.wait())
    try:
        await asyncio.wait({closed, is_ready}, return_when=asyncio.FIRST_COMPLETED)
        if not closed.done():
            writer.write(_READY)
        with suppress(ConnectionError):  # the supervisor ended before it read the report
            await closed
        on_supervisor_end()
    finally:
        closed.cancel()
        is_ready.cancel()
        writer.close()


# --- the supervisor -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Child:
    """A child process: a Python module that runs as a program and calls `report_to_supervisor`."""

    name: str
    arguments: Sequence[str] = ()
    """As in `sys.argv[1:]`."""
    number: int | None = None
    module: str = "diracx.tasks"
    process: asyncio.subprocess.Process | None = field(default=None, init=False)
    """None while it does not run."""
    is_ready: bool = field(default=False, init=False)
    """True if the process has reported that it is ready."""

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it runs."""
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)


class ChildFailedError(Exception):
    """A child cannot start, and all were stopped. The cause is in the log of the child."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name} ended with exit code {code} at its start")
        self.exit_code = code if code > 0 else 1


class Supervisor:
    """Keeps children running until it is stopped by a signal.

    Args:
        stages: the children; those of a stage are stopped when those of the previous stage have ended.
        report: logs a line.
        every_child_must_start: stop when a child ends before it was ready; else only while none has been ready.
        output: called with name and line for each line of a child's output; None: children inherit our output.
        kill_after_seconds: children of a stage that have not ended this long after SIGTERM are killed.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[Child]],
        report: Callable[[str], None],
        *,
        every_child_must_start: bool = False,
        output: Callable[[str, str], None] | None = None,
        kill_after_seconds: float | None = None,
    ) -> None:
        self._stages = stages
        self._children = [child for stage in stages for child in stage]
        self._every_child_must_start = every_child_must_start
        self._report = report
        self._output = output
        self._kill_after_seconds = kill_after_seconds
        self._stopping = asyncio.Event()
        self._any_was_ready = False
        self._exit_code = 0
        self._failure: ChildFailedError | None = None

    def handle_signals(self, *numbers: signal.Signals) -> None:
        """Stop on these signals; forward a repeated one as SIGTERM to all children to cancel running tasks."""
        for number in numbers:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            self._report(f"{number.name} again: passed on to all processes")
            for child in self._children:
                child.send(signal.SIGTERM)
        else:
            self._report(f"{number.name}: stopping")
            self.stop()

    def stop(self) -> None:
        """Stop all children, stage by stage; `run` returns when they have ended."""
        self._stopping.set()

    async def run(self, environment: Mapping[str, str] | None = None) -> int:
        """Run until stopped. Returns the first non-zero exit code of a child, or 0.

        Args:
            environment: variables to add to the environment of the children.

        Raises:
            ChildFailedError: a child cannot start; see `every_child_must_start`.
        """
        variables = {**os.environ, **(environment or {})}
        running = {child: asyncio.create_task(self._keep_running(child, variables)) for child in self._children}
        await self._stopping.wait()
        for stage in self._stages:
            for child in stage:
                child.send(signal.SIGTERM)
            _, late = await asyncio.wait([running[child] for child in stage], timeout=self._kill_after_seconds)
            for child in stage:
                if running[child] in late:
                    self._report(f"{child.name} does not stop: killing it")
                    child.send(signal.SIGKILL)
        await asyncio.gather(*running.values())
        if self._failure is not None:
            raise self._failure
        return self._exit_code

    async def _keep_running(self, child: Child, environment: Mapping[str, str]) -> None:
        """Run a child, and restart it when it ends."""
        pause = _FIRST_PAUSE_SECONDS
        while not self._stopping.is_set():
            began = time.monotonic()
            code = await self._run_once(child, environment)
            if self._stopping.is_set():
                if code != -signal.SIGTERM:  # exit code of a child that was still starting
                    self._exit_code = self._exit_code or (code if code >= 0 else 128 - code)
                return
            failed = not child.is_ready if self._every_child_must_start else code > 0 and not self._any_was_ready
            if failed:
                self._report(f"{child.name} cannot start ({_cause(code)}): stopping")
                self._failure = ChildFailedError(child.name, code)
                self.stop()
                return
            if time.monotonic() - began > _YOUNG_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            self._report(f"{child.name} has ended ({_cause(code)}): restarting in {pause:g} s")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def _run_once(self, child: Child, environment: Mapping[str, str]) -> int:
        """Start a child and wait for its end. Returns the exit code; negative: killed by that signal."""
        parent_socket, child_socket = socket.socketpair()
        parent_socket.setblocking(False)
        variables = {**environment, _SOCKET_VARIABLE: str(child_socket.fileno())}
        if child.number is not None:
            variables[_NUMBER_VARIABLE] = str(child.number)
        child.is_ready = False
        following = [asyncio.create_task(self._await_readiness(child, parent_socket))]
        streams: dict[str, Any] = {}
        with parent_socket:
            with ExitStack() as ends_of_child:
                ends_of_child.enter_context(child_socket)
                if self._output is not None:
                    # Not a pipe of asyncio: `wait` would wait for its end, and a process that a task has started
                    # may keep it open.
                    reading, writing = os.pipe()
                    pipe = ends_of_child.enter_context(os.fdopen(writing, "wb"))
                    streams = {"stdin": asyncio.subprocess.DEVNULL, "stdout": pipe, "stderr": pipe}
                    following.append(asyncio.create_task(_read_lines(reading, partial(self._output, child.name))))
                child.process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *("-m", child.module, *child.arguments),
                    env=variables,
                    pass_fds=[child_socket.fileno()],
                    start_new_session=True,  # Ctrl-C in a terminal is forwarded by the supervisor alone
                    **streams,
                )
            if self._stopping.is_set():  # the signal came while it was started
                child.send(signal.SIGTERM)
            code = await child.process.wait()
            await asyncio.wait(following, timeout=_LAST_OUTPUT_SECONDS)
            await cancel_and_wait(*following)
        return code

    async def _await_readiness(self, child: Child, parent_socket: socket.socket) -> None:
        with suppress(OSError):
            if await asyncio.get_running_loop().sock_recv(parent_socket, 1) == _READY:
                child.is_ready = self._any_was_ready = True


async def _read_lines(pipe: int, use: Callable[[str], None]) -> None:
    reader = asyncio.StreamReader(limit=_LONGEST_LINE)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(pipe, "rb")
    )
    with closing(transport):
        while True:
            try:
                line = await reader.readline()
            except ValueError:  # a line longer than the limit is skipped
                continue
            if not line:
                return
            use(line.decode(errors="replace").rstrip())


def _cause(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
