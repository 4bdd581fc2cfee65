"""Commands on the host that speaks to a site: run to their end, or ended with all that they started."""

from __future__ import annotations

__all__ = ["Completed", "LocalShell", "Shell", "inherited_environment"]

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from gubbins.exceptions import CEUnavailableError

# Not everything: the worker's environment holds the passwords of its databases.
_INHERITED = ("HOME", "LANG", "LC_ALL", "PATH", "TMPDIR", "TZ", "USER")


def inherited_environment() -> dict[str, str]:
    """What of the worker's environment others may see."""
    return {name: os.environ[name] for name in _INHERITED if name in os.environ}


class Completed(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


class Shell(Protocol):
    """A place where commands can be run."""

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float) -> Completed:
        """Run a command to its end, whatever its exit code; `timeout` in seconds.

        Raises:
            CEUnavailableError: it could not be started, or has not ended in time.
        """
        ...

    async def close(self) -> None:
        """Give back what it takes to get there."""
        ...


class LocalShell:
    """Runs commands on this host, each as the leader of a session of its own.

    Args:
        environment: all that the commands get to see; left out: what `inherited_environment` says.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(inherited_environment() if environment is None else environment)

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float) -> Completed:
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=self._environment,
                start_new_session=True,
            )
        except OSError as error:
            raise CEUnavailableError(f"{argv[0]} cannot be started: {error.strerror}") from error
        try:
            async with asyncio.timeout(timeout):
                out, err = await process.communicate(stdin)
        except BaseException as error:
            # With all that it has started. The group is there: its leader has not been waited for, or others
            # of it hold the pipes.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            if isinstance(error, TimeoutError):
                raise CEUnavailableError(f"{argv[0]} has not answered within {timeout:g} s") from error
            raise
        assert process.returncode is not None
        return Completed(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))

    async def close(self) -> None:
        pass
