"""The processes of the demo: the real commands, each with a log file."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_STOP_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """Linux ends the process when we are gone, however we went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class ServiceDiedError(RuntimeError):
    """A process of the demo ended by itself."""


class Services:
    """Starts processes, notices when one dies, and ends them in the reverse order."""

    def __init__(self, log_directory: Path, environment: Mapping[str, str]) -> None:
        self._log_directory = log_directory
        self._environment = {**os.environ, **environment}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, arguments: Sequence[str]) -> None:
        """Start `python -m arguments…`. It does not see our Ctrl-C: we pass it on, in our order."""
        with self.log(name).open("wb") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509  # there are no threads yet
            )

    def log(self, name: str) -> Path:
        return self._log_directory / f"{name.replace(' ', '-')}.log"

    def check(self) -> None:
        """Raise when a process has died.

        Raises:
            ServiceDiedError: with the last line of its log.
        """
        for name, process in self._running.items():
            if process.poll() is not None:
                lines = self.log(name).read_text(errors="replace").strip().splitlines()
                raise ServiceDiedError(f"{name} ended with {process.returncode}: {lines[-1] if lines else ''}")

    def stop(self) -> None:
        """SIGTERM to all, newest first; SIGKILL for what has not ended in time."""
        processes = list(reversed(self._running.values()))
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for process in processes:
            try:
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()
