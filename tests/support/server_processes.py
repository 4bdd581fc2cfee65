"""Processes of servers that tests start, stop for a while and end."""

from __future__ import annotations

__all__ = ["paused", "wait_until_it_responds"]

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def wait_until_it_responds(
    process: subprocess.Popen[bytes], responds: Callable[[], bool], log: Path, seconds: float
) -> None:
    """Wait until a server that was started responds. If it ends or does not respond, show the end of its log."""
    deadline = time.monotonic() + seconds
    while not responds():
        if (code := process.poll()) is not None or time.monotonic() > deadline:
            words = log.read_text(errors="replace")[-3000:]
            raise AssertionError(f"the server does not respond (exit code {code}):\n{words}")
        time.sleep(0.05)


@contextlib.contextmanager
def paused(*pids: int) -> Iterator[None]:
    """Context in which these processes are stopped: a server accepts connections and does not respond."""
    _signal(pids, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal(pids, signal.SIGCONT)


def _signal(pids: Iterable[int], which: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(pid, which)
