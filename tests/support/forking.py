"""The program that `warm_commands` starts: it imports what commands need, and forks one for each request.

A request is a JSON object in one message on the socket that the first argument names, with four files: the
command's standard input, output and error, and where to tell its process id and, when it has ended, its exit code.
Further arguments are modules to import instead.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib.metadata
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Sequence
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
_PYTHONPATH = os.environ.get("PYTHONPATH", "")
#: What is installed stays the same. Reading it takes 20 ms, and most commands do so five times.
_installed = functools.cache(importlib.metadata.entry_points)


def _serve(requests: socket.socket) -> None:
    """Fork a command for each request and report its end, until the requester has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the tests
    selector = selectors.DefaultSelector()
    selector.register(requests, selectors.EVENT_READ)
    running: dict[int, tuple[int, int]] = {}  # by the descriptor that tells the end: process id, where to report
    while True:
        for key, _ in selector.select():
            if key.fd in running:
                selector.unregister(key.fd)
                os.close(key.fd)
                pid, news = running.pop(key.fd)
                _tell(news, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                os.close(news)
                continue
            message, files, _, _ = socket.recv_fds(requests, _LARGEST_REQUEST, 4)
            if not message:
                return
            _import_all()
            *stdio, news = files
            if (pid := os.fork()) == 0:
                selector.close()
                requests.close()
                for file in (news, *running, *(others for _, others in running.values())):
                    os.close(file)
                _run(json.loads(message), stdio)
            _tell(news, pid)
            for file in stdio:
                os.close(file)
            end = os.pidfd_open(pid)
            running[end] = pid, news
            selector.register(end, selectors.EVENT_READ)


def _tell(news: int, number: int) -> None:
    with suppress(BrokenPipeError):  # the requester has ended before
        os.write(news, b"%d\n" % number)


@functools.cache
def _import_all() -> None:
    """Import what commands need, when the first is wanted."""
    importlib.metadata.entry_points = lambda **chosen: _installed().select(**chosen)
    for module in sys.argv[2:] or _IMPORTED:
        with suppress(ImportError):  # a driver that is not installed
            import_module(module)
    if not sys.argv[2:]:
        _read_commands()
    gc.collect()
    gc.freeze()  # the pages of what is imported stay shared


def _read_commands() -> None:
    """Import every command, and read its parameters, which Typer does each time that one is run."""
    for module, name in (("diracx.tasks.cli.options", "spread"), ("typer.main", "get_params_from_function")):
        setattr(import_module(module), name, functools.cache(getattr(import_module(module), name)))
    import_module("typer.main").get_command(import_module("diracx.tasks.cli").application())


def _run(request: dict[str, Any], stdio: Sequence[int]) -> NoReturn:
    """Run the command in this process, a fork of its own."""
    for number, file in enumerate(stdio):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    path = Path(sys.executable).parent / request["program"]
    sys.argv = [str(path), *request["args"]]
    sys.path[0] = str(path.parent)
    if (places := request["env"].get("PYTHONPATH", "")) != _PYTHONPATH:
        sys.path[1:1] = [place for place in places.split(os.pathsep) if place]
        _installed.cache_clear()
        with suppress(ImportError):  # as Python does when it starts
            import_module("sitecustomize")
    try:
        if path.name == "python":
            option, what, *sys.argv[1:] = request["args"]
            if option == "-m":
                runpy.run_module(what, run_name="__main__", alter_sys=True)
            else:
                exec(what, {"__name__": "__main__"})
            sys.exit(0)
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
    _serve(socket.socket(fileno=int(sys.argv[1])))
