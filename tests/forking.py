"""The program that `warm_commands` starts: it imports what commands need, and forks one for each request.

A request is a JSON object in one message on the socket that the argument names, with four files: the command's
standard input, output and error, and where to tell its process id and, when it has ended, its exit code.
"""

from __future__ import annotations

import atexit
import gc
import importlib.metadata
import json
import os
import runpy
import signal
import socket
import sys
import threading
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

_IMPORTED = (
    *("diracx.tasks.jobs", "diracx.tasks.testing", "diracx.tasks.web.dashboard.app"),
    *("diracx.tasks.plumbing.worker", "diracx.tasks.plumbing.scheduler", "diracx.tasks.plumbing.persistence.db"),
    *("diracx.db.sql", "sqlalchemy.dialects.sqlite.aiosqlite", "aiosqlite", "rich.table", "uvicorn", "yaml"),
    *("alembic.command", "mako.template", "uvloop", "rich._emoji_codes", "typer._adapters", "asyncpg", "aiomysql"),
    *("gubbins.cli.app", "gubbins.logic.my_pilots", "gubbins.tasks.my_pilots", "gubbins.metrics"),
)
_LARGEST_REQUEST = 1 << 17


def _serve(requests: socket.socket) -> None:
    """Fork a command for each request, until nobody can ask any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the tests
    while True:
        message, files, _, _ = socket.recv_fds(requests, _LARGEST_REQUEST, 4)
        _bury()
        if not message:
            return
        if os.fork() == 0:
            requests.close()
            _keep(json.loads(message), *files)
        for file in files:
            os.close(file)


def _bury() -> None:
    """Wait for the children that have ended, so that their processor time is counted."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _keep(request: dict[str, Any], stdin: int, stdout: int, stderr: int, news: int) -> NoReturn:
    """Run the command in a child and tell how it ends."""
    if pid := os.fork():
        for file in (stdin, stdout, stderr):
            os.close(file)
        os.write(news, b"%d\n" % pid)
        _, status = os.waitpid(pid, 0)
        os.write(news, b"%d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    os.close(news)
    for number, file in enumerate((stdin, stdout, stderr)):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    path = Path(sys.executable).parent / request["program"]
    sys.argv = [str(path), *request["args"]]
    sys.path[0] = str(path.parent)
    try:
        if path.suffix == ".py":
            runpy.run_path(str(path), run_name="__main__")
            sys.exit(0)
        (command,) = importlib.metadata.entry_points(group="console_scripts", name=path.name)
        sys.exit(command.load()())
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        # As Python ends, but for taking apart what was imported, which costs more than most commands do.
        threading._shutdown()  # type: ignore[attr-defined]  # there is no public way to wait for all threads
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code)


if __name__ == "__main__":
    # What is installed stays the same. Reading it takes 20 ms, and most commands do so five times.
    importlib.metadata.entry_points = importlib.metadata.entry_points().select
    for module in _IMPORTED:
        with suppress(ImportError):  # a driver that is not installed
            import_module(module)
    import_module("diracx.tasks.cli").application()  # imports every command
    gc.collect()
    gc.freeze()  # the pages of what is imported stay shared
    _serve(socket.socket(fileno=int(sys.argv[1])))
