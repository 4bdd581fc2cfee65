"""The real command line, as processes with a real server."""

from __future__ import annotations

__all__ = ["COUNT_DEAD_LETTERS", "MY_TASKS", "PROGRAM", "Background", "Cli"]

import os
import subprocess
import sys
from pathlib import Path

from support.waiting import eventually
from support.warm_commands import Running, WarmCommands

PROGRAM = Path(sys.executable).with_name("diracx-task-run")
DEADLINE_SECONDS = 40.0

MY_TASKS = """
from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from diracx.tasks.plumbing import (
    BaseTask, ConcurrencyLimiter, ExponentialBackoff, IntervalSeconds, LockedObjectType, MutexLock,
    PeriodicBaseTask, PeriodicVoAwareBaseTask, Priority, Size,
)

TASK = LockedObjectType("task")


@dataclass
class Greet(BaseTask):
    name: str
    times: int = 1

    async def execute(self) -> str:
        return " ".join([f"Hello {self.name}"] * self.times)


class Urgent(BaseTask):
    size = Size.SMALL
    priority = Priority.REALTIME
    retry_policy = ExponentialBackoff(base_delay_seconds=3, max_retries=2)
    dlq_eligible = True

    async def execute(self):
        return {"urgent": [1, 2]}


class Fail(BaseTask):
    async def execute(self):
        raise ValueError("broken by redis://u:sesame@host/1")


class Spawn(BaseTask):
    async def execute(self):
        print("spawning")
        return [await Greet(str(number)).schedule() for number in range(3)]


class NoSlots(ConcurrencyLimiter):
    limit = 1


@dataclass
class Locked(BaseTask):
    key: str

    @property
    def execution_locks(self):
        return [MutexLock(TASK, self.key), NoSlots(TASK, self.key)]

    async def execute(self):
        return "ran"


@dataclass
class Slow(BaseTask):
    begun: str
    seconds: float

    async def execute(self):
        Path(self.begun).touch()
        await asyncio.sleep(self.seconds)
        return "finished"


@dataclass
class Tick(PeriodicBaseTask):
    default_schedule = IntervalSeconds(0.2)

    async def execute(self):
        print("tick", flush=True)


class TickPerVo(PeriodicVoAwareBaseTask):
    default_schedule = IntervalSeconds(0.2)

    async def execute(self):
        print(f"tick of {self.vo}", flush=True)
"""


#: A task that wants the database, whose import takes a new process longer than all the rest.
COUNT_DEAD_LETTERS = """

from diracx.tasks.plumbing.persistence import TaskDB


class CountDeadLetters(BaseTask):
    async def execute(self, db: TaskDB):
        return len(await db.search())
"""


class Background:
    """A command that goes on by itself; its output is in a file."""

    def __init__(self, process: Running, log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def output(self) -> str:
        return self._log.read_text()

    def until(self, text: str) -> None:
        """Wait until it has printed this."""

        def seen() -> bool:
            if text in self.output:
                return True
            assert self.process.poll() is None, f"ended without {text!r}:\n{self.output}"
            return False

        try:
            eventually(seen, text)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output}") from None

    def ends(self) -> int:
        """Its exit code, when it has ended."""
        try:
            return self.process.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"does not end:\n{self.output}") from None


class Cli:
    """`diracx-task-run` in a directory with a `my_tasks.py`, in an environment without any DiracX variable."""

    def __init__(self, directory: Path, commands: WarmCommands) -> None:
        self.directory = directory
        self.commands = commands
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("DIRACX_", "FORCE_COLOR"))
        }
        self._started: list[Running] = []
        (directory / "my_tasks.py").write_text(MY_TASKS)

    def __call__(
        self, *args: str, typed: str | None = None, terminal: bool = False, program: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. `program`: another way to start it, in a new Python.

        What is typed comes from a file, or from a terminal.
        """
        if not program:
            return self.commands.run(
                [PROGRAM.name, *args],
                cwd=self.directory,
                env=self.environment,
                typed=typed,
                terminal=terminal,
                timeout=DEADLINE_SECONDS,
            )
        return subprocess.run(
            [*program, *args],
            cwd=self.directory,
            env=self.environment,
            input=typed,
            stdin=subprocess.DEVNULL if typed is None else None,
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            check=False,
        )

    def add_tasks(self, source: str) -> None:
        """Append to `my_tasks.py`."""
        with (self.directory / "my_tasks.py").open("a") as tasks:
            tasks.write(source)

    def mine(self, command: str, *args: str, typed: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command with the tasks of `my_tasks.py`."""
        return self(command, *args, "--module", "my_tasks.py", typed=typed)

    def start(self, *args: str, new_python: bool = False) -> Background:
        """Start a command, which is ended with the test if it still runs."""
        path = self.directory / f"output-{len(self._started)}.log"
        with path.open("wb") as log:
            process = self.commands.start(
                [PROGRAM.name, *args],
                cwd=self.directory,
                env=self.environment,
                stdout=log,
                stderr=log,
                new_python=new_python,
            )
        self._started.append(process)
        return Background(process, path)

    def stop(self) -> None:
        """End running processes, as an init system does."""
        for process in self._started:
            process.terminate()
        for process in self._started:
            try:
                process.wait(DEADLINE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
