"""Records that tasks write of themselves: one append-only file for each process, unbuffered.

A line outlives the SIGKILL of its writer. Times are CLOCK_MONOTONIC, which all processes of a machine share.
Redis has no part in it.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from diracx.tasks.plumbing import BaseTask, ExponentialBackoff, RetryPolicyBase

#: The directory of the files; set by the driver for every worker.
VARIABLE = "CHAOS_RECORDS"
_runs = itertools.count(1)
_files: dict[int, int] = {}


def note(mark: str, run: int, kind: str, n: int, how: str = "-") -> None:
    """Append one line: mark, time (ns), pid, run, kind, n, how it went."""
    pid = os.getpid()
    if pid not in _files:
        path = Path(os.environ[VARIABLE]) / f"{pid}-{time.monotonic_ns()}.log"
        _files[pid] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(_files[pid], f"{mark} {time.monotonic_ns()} {pid} {run} {kind} {n} {how}\n".encode())


def next_run() -> int:
    """A number for an execution in this process."""
    return next(_runs)


class Recorded(BaseTask):
    """A task with a number that records its executions. Retried until it succeeds."""

    n: int
    retry_policy: ClassVar[RetryPolicyBase] = ExponentialBackoff(base_delay_seconds=1, max_retries=6)
    dlq_eligible = True

    @contextmanager
    def at_work(self) -> Iterator[None]:
        run, kind = next_run(), type(self).__name__
        note("S", run, kind, self.n)
        try:
            yield
        except BaseException as error:
            note("E", run, kind, self.n, type(error).__name__)
            raise
        note("E", run, kind, self.n, "ok")


@dataclass(slots=True)
class Run:
    """One execution. Times are in seconds on the monotonic clock."""

    kind: str
    n: int
    pid: int
    start: float
    end: float | None = None
    """None: its process died first."""
    how: str = ""


@dataclass(slots=True)
class Records:
    """All records of a run."""

    runs: list[Run] = field(default_factory=list)
    killed_by_task: dict[int, float] = field(default_factory=dict)
    """pid -> time when a task killed the process."""


def read(directory: Path) -> Records:
    """All files of all processes, executions by their start."""
    found = Records()
    for path in directory.glob("*.log"):
        runs: dict[str, Run] = {}
        for line in path.read_text().splitlines():
            mark, ns, pid, run, kind, n, how = line.split()
            at = int(ns) / 1e9
            if mark == "S":
                runs[run] = Run(kind, int(n), int(pid), at)
            elif mark == "E":
                runs[run].end, runs[run].how = at, how
            else:
                found.killed_by_task[int(pid)] = at
        found.runs += runs.values()
    found.runs.sort(key=lambda run: run.start)
    return found
