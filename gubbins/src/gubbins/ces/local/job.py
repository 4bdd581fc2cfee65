"""One pilot's directory: made, started, read and ended. All of it blocks; the back end calls it in a thread."""

from __future__ import annotations

__all__ = ["LocalJob", "sweep"]

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gubbins.ces.protocol import OUTPUT_LIMIT_BYTES, Observation, Observed, PilotOutput
from gubbins.exceptions import CEUnavailableError

WRAPPER = Path(__file__).with_name("wrapper.sh")
LAUNCH_TIMEOUT_SECONDS = 30
# A wrapper writes its pid within milliseconds; one that has not done so after this long was never started.
NEVER_STARTED_SECONDS = 60
_UNHEARD_OF_SECONDS = 30 * 24 * 3600
_MAX_STDERR_CHARS = 200


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    group: int
    start_ticks: str
    boot_id: str

    def alive(self) -> bool:
        """Whether this very process runs, in this group; another one with its number is not mistaken for it."""
        try:
            # The command, in parentheses, may contain anything; what follows it does not.
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return False
        state, group, start_ticks = fields[0], int(fields[2]), fields[19]
        return (
            state not in "ZX"
            and group == self.group
            and start_ticks == self.start_ticks
            and boot_id == self.boot_id
        )


@dataclass(frozen=True, slots=True)
class LocalJob:
    """The directory of one pilot, named after its stamp."""

    path: Path

    def create(self, script: str) -> bool:
        """Make the directory with the pilot script; False when it exists: the pilot was submitted before."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        prepared = Path(tempfile.mkdtemp(prefix=".new-", dir=self.path.parent))
        try:
            text = script if script.startswith("#!") else f"#!/bin/sh\n{script}"
            (prepared / "script").write_text(text if text.endswith("\n") else f"{text}\n")
            prepared.rename(self.path)
        except OSError:
            shutil.rmtree(prepared, ignore_errors=True)
            if self.path.is_dir():
                return False
            raise
        return True

    def launch(self, environment: Mapping[str, str]) -> None:
        """Start the wrapper in a session of its own, as nobody's child: it outlives the worker.

        Raises:
            OSError, subprocess.SubprocessError: it could not be started; the directory is gone again.
            CEUnavailableError: it may have been started.
        """
        try:
            subprocess.run(
                ["/bin/sh", "-c", '/bin/sh "$1" "$2" &', "launch", str(WRAPPER), str(self.path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=dict(environment),
                start_new_session=True,
                check=True,
                timeout=LAUNCH_TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            message = (
                f"pilot {self.path.name}: nobody knows after {LAUNCH_TIMEOUT_SECONDS} s whether it was started"
            )
            raise CEUnavailableError(message) from error
        except (OSError, subprocess.SubprocessError):
            self.remove()
            raise

    def observe(self) -> Observation | None:
        """What has become of the pilot; None: there is no such directory."""
        code = self._exit_code()
        if code is None:
            process = self._process()
            if process is None:
                return self._not_started()
            if process.alive():
                return Observation(Observed.RUNNING)
            # It may have written its exit code and ended since we looked for it.
            code = self._exit_code()
        cancelled = (self.path / "cancelled").exists()
        if code == 0:
            return Observation(Observed.DONE)
        if code is None:
            return Observation(
                Observed.FAILED, "cancelled" if cancelled else "the process vanished without an exit code"
            )
        reason = f"cancelled (exit code {code})" if cancelled else f"exit code {code}"
        last_words = self._last_line_of_stderr()
        return Observation(Observed.FAILED, f"{reason}: {last_words}" if last_words else reason)

    def cancel(self, *, kill_after_seconds: float) -> None:
        """Ask the pilot to end (SIGTERM); asked again after `kill_after_seconds`, make it end (SIGKILL)."""
        if not self.path.is_dir() or self._exit_code() is not None:
            return
        mark = self.path / "cancelled"
        with contextlib.suppress(FileExistsError):
            mark.touch(exist_ok=False)
        process = self._process()
        # Without a process file the wrapper has yet to look for the mark.
        if process is not None and process.alive():
            patience_is_over = time.time() - mark.stat().st_mtime >= kill_after_seconds
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.group, signal.SIGKILL if patience_is_over else signal.SIGTERM)

    def output(self) -> PilotOutput:
        """What the pilot has written so far.

        Raises:
            FileNotFoundError: there is no such directory.
        """
        self.path.stat()
        return PilotOutput(*(self._tail(name, OUTPUT_LIMIT_BYTES) for name in ("stdout", "stderr")))

    def mark_forgotten(self) -> None:
        """Have the directory swept away when its time is over."""
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            (self.path / "forgotten").touch(exist_ok=False)

    def remove(self) -> None:
        """Delete the directory."""
        shutil.rmtree(self.path, ignore_errors=True)

    def wrote_before(self, name: str, timestamp: float) -> bool:
        """Whether there is such a file, and it was written before then (s since 1970)."""
        try:
            return (self.path / name).stat().st_mtime <= timestamp
        except OSError:
            return False

    def _not_started(self) -> Observation | None:
        try:
            age_seconds = time.time() - self.path.stat().st_mtime
        except FileNotFoundError:
            return None
        if age_seconds < NEVER_STARTED_SECONDS:
            return Observation(Observed.WAITING)
        return Observation(Observed.FAILED, "the pilot process was never started")

    def _exit_code(self) -> int | None:
        try:
            return int((self.path / "rc").read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            return 1  # a full disk leaves an empty file: it ended, and not well

    def _process(self) -> _Process | None:
        try:
            pid, group, start_ticks, boot_id = (self.path / "pid").read_text().split()
            process = _Process(int(pid), int(group), start_ticks, boot_id)
        except (FileNotFoundError, ValueError):
            return None
        # The pilot can write what it likes in there, and a signal to the groups 0 and 1 would reach far more than
        # a pilot.
        return process if process.pid > 1 and process.group > 1 else None

    def _last_line_of_stderr(self) -> str:
        lines = self._tail("stderr", 4096).split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:_MAX_STDERR_CHARS]

    def _tail(self, name: str, limit_bytes: int) -> str:
        try:
            with (self.path / name).open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - limit_bytes))
                return file.read().decode(errors="replace")
        except OSError:
            return ""  # the pilot has not come so far


def sweep(directory: Path, *, keep_seconds: float) -> None:
    """Delete the jobs below `directory` that were marked as forgotten so long ago, and those that ended a month
    before that and were never heard of again."""
    now = time.time()
    for path in directory.glob("*/script"):
        job = LocalJob(path.parent)
        if job.wrote_before("forgotten", now - keep_seconds) or job.wrote_before(
            "rc", now - keep_seconds - _UNHEARD_OF_SECONDS
        ):
            job.remove()
