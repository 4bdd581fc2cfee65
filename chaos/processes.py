"""Processes in the chaos tests: our own command line, restarted as by a supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

#: A process that ended is started again after so long.
RESTART_SECONDS = 0.2


@dataclass
class History:
    """Disturbances of processes, by pid. Times are in seconds on the monotonic clock."""

    killed: dict[int, float] = field(default_factory=dict)
    pauses: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    ended: dict[int, tuple[float, int]] = field(default_factory=dict)
    """pid -> when it was found ended, exit code."""
    started: dict[int, float] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    """pid -> the place it was started in."""
    disconnected: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Name of a place -> when its link was held or delayed."""
    stopped: dict[int, float] = field(default_factory=dict)
    """Processes that got a SIGTERM."""


class Supervised:
    """One place for a process."""

    def __init__(self, name: str, arguments: list[str], environment: dict[str, str], logs: Path, history: History):
        self.name = name
        self._arguments = [sys.executable, "-m", "diracx.tasks", *arguments]
        self._environment = environment
        self._log = logs / f"{name}.log"
        self._history = history
        self._process: subprocess.Popen[bytes] | None = None
        self._paused_at: float | None = None
        self.resume_at: float | None = None
        self._start_at = 0.0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def paused(self) -> bool:
        return self._paused_at is not None

    def look(self, *, restart: bool = True) -> None:
        """Process due actions: record the end of the process, restart it, resume it."""
        now = time.monotonic()
        if self.resume_at is not None and now >= self.resume_at:
            self.resume()
        if self._process is not None and (code := self._process.poll()) is not None:
            self._history.ended[self._process.pid] = (now, code)
            self._process = None
            self._paused_at = self.resume_at = None
            self._start_at = now + RESTART_SECONDS
        if self._process is None and restart and now >= self._start_at:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._arguments,
                    env={**os.environ, **self._environment},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self._history.started[self._process.pid] = now
            self._history.names[self._process.pid] = self.name

    def kill(self) -> None:
        if self._process is not None:
            # Noted before: nothing that it does later may count as done by a dead process.
            self._history.killed[self._process.pid] = time.monotonic()
            if self.paused:
                self._note_pause()
            self._process.kill()

    def terminate(self) -> None:
        if self._process is not None:
            self._history.stopped[self._process.pid] = time.monotonic()
            self._process.terminate()

    def pause(self, seconds: float) -> None:
        if self._process is not None and not self.paused:
            self._paused_at = time.monotonic()
            self._process.send_signal(signal.SIGSTOP)
            self.resume_at = time.monotonic() + seconds

    def resume(self) -> None:
        if self._process is not None and self.paused:
            self._process.send_signal(signal.SIGCONT)
            self._note_pause()
        self.resume_at = None

    def _note_pause(self) -> None:
        assert self._process is not None
        assert self._paused_at is not None
        self._history.pauses.setdefault(self._process.pid, []).append((self._paused_at, time.monotonic()))
        self._paused_at = None

    def wait_end(self, seconds: float) -> None:
        """Wait for the end after `terminate`, and force it when it does not come."""
        if self._process is None:
            return
        try:
            code = self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._history.ended[self._process.pid] = (time.monotonic(), code)
        self._process = None
