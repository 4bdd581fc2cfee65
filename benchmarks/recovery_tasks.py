"""Tasks that record their starts, each in a file that outlives its process."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from diracx.tasks.plumbing import BaseTask, NoRetry

#: The variable with the directory of the files.
WITNESS = "RECOVERY_WITNESS"
#: A file there: from now on `Kills` kills.
GO = "go"


def _note(mark: str, n: int) -> int:
    """Append a line that outlives the process. Returns how often this task has begun."""
    path = Path(os.environ[WITNESS]) / str(n)
    with path.open("a") as file:
        file.write(f"{mark} {os.getpid()} {time.time()}\n")
    return path.read_text().count("begun")


@dataclass
class Held(BaseTask):
    """Runs until its worker ends, and `again_seconds` when it runs again."""

    n: int
    again_seconds: float = 0.0

    async def execute(self) -> None:
        await asyncio.sleep(600 if _note("begun", self.n) == 1 else self.again_seconds)


@dataclass
class Short(BaseTask):
    """Other work."""

    n: int
    seconds: float

    async def execute(self) -> None:
        _note("begun", self.n)
        await asyncio.sleep(self.seconds)


@dataclass
class Kills(BaseTask):
    """Crashes its worker, every time; the first time on request."""

    n: int
    retry_policy = NoRetry()

    async def execute(self) -> None:
        first = _note("begun", self.n) == 1
        while first and not (Path(os.environ[WITNESS]) / GO).exists():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
