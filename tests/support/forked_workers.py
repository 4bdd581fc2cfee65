"""A pytest plugin: the processes of `-n` are forked from one that has imported all tests.

Python, the plugins and 250 files of tests take each process 7 s of processor time to import, and 15 s when their
bytecode is not there yet.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
from execnet import gateway_io
from execnet.gateway_base import Popen2IO

from support import warm_commands


class _ForkedIO(Popen2IO):
    """The IO of execnet with a forked process."""

    def __init__(self, pid: int, to_it: int, from_it: int, execmodel: Any) -> None:
        super().__init__(os.fdopen(to_it, "wb"), os.fdopen(from_it, "rb"), execmodel)
        self._pid = pid

    def wait(self) -> int | None:
        with suppress(ChildProcessError):
            return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return None

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Fork them while there is one thread. One that is started later, for one that died, is a new Python."""
    number = getattr(session.config.option, "numprocesses", None)
    if not number or session.config.option.collectonly:
        return
    _import_tests(session)
    warm_commands.shared = commands = warm_commands.WarmCommands()
    session.config.add_cleanup(commands.close)
    gc.collect()
    gc.freeze()  # the pages of what is imported stay shared
    forked: list[tuple[int, int, int]] = []
    for _ in range(number):
        from_us, to_it = os.pipe()
        from_it, to_us = os.pipe()
        pid = os.fork()
        if pid == 0:
            for _, *ours in [*forked, (pid, to_it, from_it)]:
                os.close(ours[0])
                os.close(ours[1])
            _serve(from_us, to_us)
        os.close(from_us)
        os.close(to_us)
        forked.append((pid, to_it, from_it))
    start_new = gateway_io.create_io

    def create_io(spec: Any, execmodel: Any) -> Any:
        return _ForkedIO(*forked.pop(0), execmodel) if spec.popen and forked else start_new(spec, execmodel)

    gateway_io.create_io = create_io


def _import_tests(session: pytest.Session) -> None:
    """Import the given files; failed ones are retried and reported by each process."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for argument in session.config.args:
            path = Path(session.config.invocation_params.dir, argument.partition("::")[0])
            for file in [path] if path.is_file() else sorted(path.rglob("test_*.py")):
                with suppress(Exception, pytest.skip.Exception):
                    assert pytest.Module.from_parent(session, path=file).obj


def _serve(stdin: int, stdout: int) -> NoReturn:
    """Serve as an execnet worker until the end of the tests."""
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.close(stdin)
    os.close(stdout)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(0, closefd=False),
        os.fdopen(1, "w", closefd=False),
        sys.__stderr__,
    )
    try:
        exec(eval(sys.stdin.readline()), {"__name__": "__main__"})
    finally:
        sys.stderr.flush()
        os._exit(0)
