"""Execution of commands on this host, with time-outs that kill a command with its children."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO, NamedTuple, Protocol, Self

from gubbins.ces.protocol import NothingDoneError
from gubbins.domain.exceptions import CEUnavailableError

MAX_RESPONSE_BYTES = 64 * 1024 * 1024
"""Limit of stdout, and of stderr, of a command."""

# The environment of a worker contains passwords of databases.
_INHERITED = ("HOME", "LANG", "LC_ALL", "PATH", "TMPDIR", "TZ", "USER")


def inherited_environment() -> dict[str, str]:
    """Variables of the worker's environment that are passed to commands and pilots."""
    return {name: os.environ[name] for name in _INHERITED if name in os.environ}


class Completed(NamedTuple):
    """Result of a command."""

    returncode: int
    stdout: str
    stderr: str


class Shell(Protocol):
    """Executor of commands, local or remote."""

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float) -> Completed:
        """Run a command to its end, with any exit code; `timeout` in seconds.

        Raises:
            NothingDoneError: it could not be started.
            CEUnavailableError: it did not end in time, or has too much output.
        """
        ...

    async def close(self) -> None:
        """Close the connection."""
        ...


class LocalShell:
    """Runs commands on this host, each in a session of its own.

    Args:
        environment: complete environment of the commands; default: `inherited_environment`.
        max_bytes: limit of stdout, and of stderr.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, max_bytes: int = MAX_RESPONSE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._environment = dict(inherited_environment() if environment is None else environment)

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float) -> Completed:
        with _Pipe(self._max_bytes) as out, _Pipe(self._max_bytes) as err:
            try:
                with _input(stdin) as file, out.write_end, err.write_end:
                    # asyncio blocks as long; uvloop passes more file descriptors, which a daemon would hold.
                    process = subprocess.Popen(  # noqa: ASYNC220
                        argv,
                        stdin=file,
                        stdout=out.write_end,
                        stderr=err.write_end,
                        env=self._environment,
                        start_new_session=True,
                    )
            except OSError as error:
                raise NothingDoneError(f"{argv[0]} cannot be started: {error.strerror}") from error
            try:
                async with asyncio.timeout(timeout):
                    async with asyncio.TaskGroup() as group:
                        output = [group.create_task(pipe.read()) for pipe in (out, err)]
                    returncode = await _ended(process)
            except BaseException as error:
                # The whole process group, which exists: its leader was not waited for, or others hold the pipes.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                await _ended(process)
                if isinstance(error, TimeoutError):
                    raise CEUnavailableError(f"{argv[0]} has not responded within {timeout:g} s") from error
                if isinstance(error, ExceptionGroup):
                    raise CEUnavailableError(f"{argv[0]}: {error.exceptions[0]}") from error
                raise
        return Completed(returncode, *(text.result().decode(errors="replace") for text in output))

    async def close(self) -> None:
        pass


async def _ended(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end of a process without output; not in a thread, as tasks may occupy all for hours."""
    pause = 0.001
    while (returncode := process.poll()) is None:
        await asyncio.sleep(pause)
        pause = min(2 * pause, 0.1)
    return returncode


class _Pipe:
    """Pipe for the output of a command, independent of the event loop.

    Pipes of uvloop are sockets, so that scripts cannot open /dev/stderr.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        self._read_end = os.fdopen(read_end, "rb", buffering=0)
        self.write_end = os.fdopen(write_end, "wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._read_end.close()
        self.write_end.close()

    async def read(self) -> bytes:
        """Read until the write end is closed everywhere.

        Raises:
            ValueError: there is more than `max_bytes`.
        """
        loop, data, end = asyncio.get_running_loop(), bytearray(), asyncio.Event()

        def read() -> None:
            part = self._read_end.read(65536)
            if part:
                data.extend(part)
                if len(data) > self._max_bytes:
                    end.set()
            elif part is not None:  # None: nothing yet
                end.set()

        loop.add_reader(self._read_end, read)
        try:
            await end.wait()
        finally:
            loop.remove_reader(self._read_end)
        if len(data) > self._max_bytes:
            raise ValueError(f"a response of more than {self._max_bytes} bytes")
        return bytes(data)


def _input(data: bytes) -> IO[bytes]:
    """Make a file in memory: writing to a pipe would fail if the command closes its input early."""
    file = os.fdopen(os.memfd_create("stdin"), "wb")
    file.write(data)
    file.seek(0)
    return file
