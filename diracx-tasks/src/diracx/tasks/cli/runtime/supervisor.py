"""`worker --processes N`: one command uses N cores. A supervisor starts what dies again and passes signals on.

Each child is the same command once more, told by two variables of its environment which one it is and which
socket binds it to the supervisor. Through it the child says that it is ready, and hears, when it closes, that
the supervisor is gone: then it stops as it would on SIGTERM, for nobody would look after it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

logger = logging.getLogger(__name__)

_NUMBER_VARIABLE = "DIRACX_TASKS_PROCESS_NUMBER"
_SOCKET_VARIABLE = "DIRACX_TASKS_SUPERVISOR_SOCKET"
_READY = b"r"

#: A child that dies is started again after so long; twice as long each time it dies young.
_SHORTEST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
_YOUNG_SECONDS = 10.0


@cache
def _told(variable: str) -> int | None:
    """What the supervisor told, and forgotten by that: what a task starts is no child of the supervisor."""
    number = os.environ.pop(variable, None)
    return None if number is None else int(number)


def own_number() -> int | None:
    """Number of this child, from 1; None of a process without a supervisor."""
    return _told(_NUMBER_VARIABLE)


def is_supervised() -> bool:
    """Whether this process is a child of a supervisor."""
    return _told(_SOCKET_VARIABLE) is not None


async def serve_supervised(ready: asyncio.Event, stop: Callable[[], None]) -> None:
    """In a child: say when it is ready, and call `stop` when the supervisor is gone."""
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=_told(_SOCKET_VARIABLE)))
    gone = asyncio.ensure_future(reader.read())
    is_ready = asyncio.ensure_future(ready.wait())
    try:
        await asyncio.wait({gone, is_ready}, return_when=asyncio.FIRST_COMPLETED)
        if not gone.done():
            writer.write(_READY)
        with suppress(ConnectionError):  # it had not read our word
            await gone
        logger.warning("the supervisor is gone: stopping")
        stop()
    finally:
        gone.cancel()
        is_ready.cancel()
        writer.close()


class Supervisor:
    """Keeps `processes` copies of this command running.

    Args:
        arguments: of the command, as in `sys.argv[1:]`.
    """

    def __init__(self, arguments: list[str], processes: int) -> None:
        self._arguments = arguments
        self._processes = processes
        self._stopping = asyncio.Event()
        self._exit_code = 0
        self._any_was_ready = False
        self._children: dict[int, asyncio.subprocess.Process] = {}

    async def run(self) -> int:
        """Run until stopped, or until a child cannot even start and none ever could. Returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._pass_on, number)
        await asyncio.gather(*(self._keep_up(number) for number in range(1, self._processes + 1)))
        logger.info("stopped: all %d processes have ended", self._processes)
        return self._exit_code

    def _pass_on(self, number: signal.Signals) -> None:
        again = " again" if self._stopping.is_set() else ""
        logger.info("%s%s: passed on to %d processes", number.name, again, len(self._children))
        self._stopping.set()
        for child in self._children.values():
            if child.returncode is None:
                child.send_signal(signal.SIGTERM)

    async def _keep_up(self, number: int) -> None:
        """One place: start a child, and another one when it dies."""
        pause = _SHORTEST_PAUSE_SECONDS
        while not self._stopping.is_set():
            began = time.monotonic()
            code = await self._one_life(number)
            if self._stopping.is_set():
                if code != -signal.SIGTERM:  # which is how one ends that was still starting
                    self._exit_code = self._exit_code or (code if code >= 0 else 128 - code)
                return
            if not self._any_was_ready and code > 0:
                # It said why in its log, and would again.
                logger.error("process %d cannot start (exit code %d): stopping", number, code)
                self._exit_code = code
                self._pass_on(signal.SIGTERM)
                return
            pause = _SHORTEST_PAUSE_SECONDS if time.monotonic() - began > _YOUNG_SECONDS else pause
            logger.warning("process %d has ended (%s): another in %g s", number, _how(code), pause)
            try:
                await asyncio.wait_for(self._stopping.wait(), pause)
            except TimeoutError:
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def _one_life(self, number: int) -> int:
        """Returns the exit code (negative: of a signal)."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours, self._hearing(ours):
            with theirs:
                child = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "diracx.tasks",
                    *self._arguments,
                    env={
                        **os.environ,
                        _NUMBER_VARIABLE: str(number),
                        _SOCKET_VARIABLE: str(theirs.fileno()),
                    },
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C in a terminal reaches it through us, and once
                )
            self._children[number] = child
            if self._stopping.is_set():  # the signal came while it was born
                child.send_signal(signal.SIGTERM)
            code = await child.wait()
            del self._children[number]
            self._hear(ours)
            return code

    @contextmanager
    def _hearing(self, child: socket.socket) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        loop.add_reader(child, self._hear, child)
        try:
            yield
        finally:
            loop.remove_reader(child)

    def _hear(self, child: socket.socket) -> None:
        with suppress(OSError):
            if child.recv(1) == _READY:
                self._any_was_ready = True
        asyncio.get_running_loop().remove_reader(child)  # it says one word


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
