"""Worker processes: start, inspect, pause, end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_GRACE_SECONDS = 8.0


class FailedError(RuntimeError):
    """A peer failed to do its work."""


class Service:
    """A process with a session of its own, so that all its children are known and end with it."""

    def __init__(self, command: list[str], environment: Mapping[str, str], directory: Path, log: Path) -> None:
        self._command = command
        self._environment = dict(environment)
        self._directory = directory
        self._log = log

    def __enter__(self) -> Self:
        with self._log.open("wb") as output:
            self.started = time.monotonic()
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)
        self._process.wait()

    def check(self) -> None:
        """Raise `FailedError` when it has ended."""
        code = self._process.poll()
        if code is not None:
            raise FailedError(f"ended with exit code {code}: {self.last_words()}")

    def last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return " / ".join(line.strip() for line in lines[-3:])[-400:] or "it said nothing"

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and all its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def stop(self) -> None:
        """End it as its operator would, by SIGTERM; by SIGKILL when it does not end within some seconds."""
        self._process.terminate()
        try:
            self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self._process.wait()

    def rss_bytes(self) -> int:
        """Memory of the process and its children; pages that they share count for each."""
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self._pids()) * _PAGE

    def cpu_seconds(self) -> float:
        """Time on a processor so far, of the process and its living children."""
        return sum(sum(int(field) for field in _stat(pid)[11:13]) for pid in self._pids()) / _TICKS

    def _pids(self) -> list[int]:
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
        return [pid for pid in pids if (fields := _stat(pid)) and int(fields[3]) == self._process.pid]


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name, beginning with the state; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
