"""A pytest plugin: the project's commands without their time to start.

Python and what a command imports cost up to two seconds of processor time before the command does anything, and
the tests run more than a thousand commands. `warm_commands` starts one process that has imported everything
(`forking.py`), and each command is forked from it: a process of its own with its own environment, directory,
files and end. What is about starting itself (what is imported, how modules are found) asks for a new Python; so
does, automatically, a command whose environment changes Python's own variables but PYTHONPATH,
which is heeded.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pytest


class ForkedCommand:
    """A running command, as `subprocess.Popen` shows one."""

    def __init__(self, args: Sequence[str], news: IO[bytes]) -> None:
        self.args = list(args)
        self.returncode: int | None = None
        self._news = news  # two lines: the process id, and at the end the exit code
        self.pid = self._next()

    def _next(self) -> int:
        line = self._news.readline()
        assert line, f"the process that was to start {self.args[0]} has ended: see what it wrote to standard error"
        return int(line)

    def poll(self) -> int | None:
        """Its exit code, if it has ended (negative: of a signal)."""
        return self._exit_code(0)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not within `timeout` seconds.
        """
        code = self._exit_code(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def _exit_code(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._news], [], [], timeout)[0]:
            self.returncode = self._next()
            self._news.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it is known to have ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


Running = ForkedCommand | subprocess.Popen[bytes]


class WarmCommands:
    """Starts the commands that the project installs.

    Args:
        modules: are imported, in place of those that the commands need.
        python: of the environment that has the commands, by default this one.
    """

    def __init__(self, *modules: str, python: str = sys.executable) -> None:
        self.python = python
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._python = _pythons_own(os.environ)
        unwanted = ("DIRACX_", "FORCE_COLOR")
        with theirs:
            self._process = subprocess.Popen(
                [python, str(Path(__file__).with_name("forking.py")), str(theirs.fileno()), *modules],
                env={name: value for name, value in os.environ.items() if not name.startswith(unwanted)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def close(self) -> None:
        """End the process that commands are forked from; those that run go on."""
        self._requests.close()
        self._process.wait()

    def start(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdout: IO[bytes],
        stderr: IO[bytes],
        stdin: IO[bytes] | None = None,
        cwd: Path | None = None,
        new_python: bool = False,
    ) -> Running:
        """Start a command, by its name, a script in Python, by its path, or `python -c` and `python -m`.

        Args:
            command: name or path, and arguments.
            stdin: None is empty.
            new_python: not forked, but from the start.
        """
        program, *args = command
        if new_python or _pythons_own(env) != self._python:
            path = str(Path(self.python).parent / program)
            before = [self.python] if path.endswith(".py") else []
            stdio: dict[str, Any] = {"stdin": stdin or subprocess.DEVNULL, "stdout": stdout, "stderr": stderr}
            return subprocess.Popen([*before, path, *args], cwd=cwd, env=env, **stdio)
        request = {"program": program, "args": args, "cwd": str(cwd or Path.cwd()), "env": dict(env)}
        reader, writer = os.pipe()
        with open(os.devnull, "rb") as nothing, os.fdopen(writer, "wb") as news:
            files = [(stdin or nothing).fileno(), stdout.fileno(), stderr.fileno(), news.fileno()]
            socket.send_fds(self._requests, [json.dumps(request).encode()], files)
        return ForkedCommand(command, os.fdopen(reader, "rb", buffering=0))

    def popen(self, command: Sequence[str], **how: Any) -> Any:
        """Start a command of the environment, by its path, as `subprocess.Popen` does, but forked."""
        if command[:3] == [sys.executable, "-m", "diracx.tasks"]:
            return self.start(["diracx-tasks", *command[3:]], **how)
        assert Path(command[0]).parent == Path(self.python).parent
        return self.start([Path(command[0]).name, *command[1:]], **how)

    def worker(self, script: Path, *args: str, env: Mapping[str, str]) -> Running:
        """Start a script that prints the one line `ready`, and wait until it has."""
        reader, writer = os.pipe()
        with os.fdopen(reader) as outputs:
            with os.fdopen(writer, "wb") as stdout, os.fdopen(os.dup(2), "wb") as stderr:
                process = self.start([str(script), *args], env=env, stdout=stdout, stderr=stderr)
            assert outputs.readline() == "ready\n"
        return process

    def run(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        timeout: float,
        typed: str | None = None,
        terminal: bool = False,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, like `subprocess.run`, and capture its output.

        Args:
            typed: its standard input, from a file or on a terminal.
        """
        with (
            _typed(typed or "", terminal) as stdin,
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
        ):
            process = self.start(command, cwd=cwd, env=env, stdin=stdin, stdout=out, stderr=err)
            try:
                code = process.wait(timeout)
            except BaseException:
                process.kill()
                process.wait()
                raise
            outputs = []
            for file in (out, err):
                file.seek(0)
                outputs.append(file.read().decode())
        return subprocess.CompletedProcess(command, code, *outputs)


@contextlib.contextmanager
def _typed(text: str, terminal: bool) -> Iterator[IO[bytes]]:
    """A file, or the one end of a terminal, from which the text can be read."""
    if not terminal:
        with tempfile.TemporaryFile() as stdin:
            stdin.write(text.encode())
            stdin.seek(0)
            yield stdin
        return
    leader, follower = pty.openpty()
    with os.fdopen(leader, "wb", buffering=0) as keyboard, os.fdopen(follower, "rb", buffering=0) as stdin:
        keyboard.write(text.encode())
        yield stdin


def _pythons_own(environment: Mapping[str, str]) -> dict[str, str]:
    own = {name: value for name, value in environment.items() if name.startswith("PYTHON")}
    return {name: own[name] for name in own if name != "PYTHONPATH"}


#: What the processes that run tests were forked with, if they were.
shared: WarmCommands | None = None


@pytest.fixture(scope="session")
def warm_commands() -> Iterator[WarmCommands]:
    """One for all processes that run tests, or for the only one."""
    if shared is not None:
        yield shared
        return
    commands = WarmCommands()
    yield commands
    commands.close()
