"""Calls of HTCondor's bindings without their time to start, which is nine tenths of their processor time."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from gubbins.ces.transports.shell import Completed
from gubbins.domain.exceptions import CEUnavailableError

from .warm_commands import WarmCommands

_PROGRAM = str(Path(__file__).with_name("reload_bindings.py"))


class WarmShell:
    """Runs the program of the bindings as a fork of a process that has imported them."""

    def __init__(self, commands: WarmCommands, environment: Mapping[str, str]) -> None:
        self._commands = commands
        pythons_own = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
        self._environment = pythons_own | dict(environment)

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float) -> Completed:
        *_, directory, _, program = argv
        how = {"env": self._environment, "cwd": Path(directory), "typed": stdin.decode(), "timeout": timeout}
        try:
            done = await asyncio.to_thread(self._commands.run, [_PROGRAM, program], **how)
        except subprocess.TimeoutExpired as error:
            raise CEUnavailableError(f"{argv[0]} has not responded within {timeout:g} s") from error
        return Completed(done.returncode, done.stdout, done.stderr)

    async def close(self) -> None:
        pass
