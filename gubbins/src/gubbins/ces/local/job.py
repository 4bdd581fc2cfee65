"""One pilot's directory: made, started, read and ended. All of it blocks; the back end calls it in a thread."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gubbins.ces.protocol import OUTPUT_LIMIT_BYTES, Observation, Observed, PilotOutput, observed_end
from gubbins.ces.settings import SECRET_FILE, executable_script
from gubbins.domain.exceptions import CEUnavailableError

from .account import Account
from .files import modified_at, raise_unless_absent, read_end, read_start

logger = logging.getLogger(__name__)

WRAPPER = Path(__file__).with_name("wrapper.sh")
LAUNCH_TIMEOUT_SECONDS = 30
_UNHEARD_OF_SECONDS = 30 * 24 * 3600
_MAX_STDERR_CHARS = 200
_MAX_STDERR_BYTES = 4096
_MAX_CODE_BYTES = 16
_MAX_PID_BYTES = 256
_MAX_ENVIRON_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    group: int
    start_ticks: str
    boot_id: str

    def belongs_to(self, stamp: str) -> bool:
        """Check that the process was started for this pilot, by the stamp in its environment.

        A pilot can write into its directory the numbers of any process: no other has its stamp.
        """
        try:
            with Path(f"/proc/{self.pid}/environ").open("rb") as file:
                return f"PILOT_STAMP={stamp}".encode() in file.read(_MAX_ENVIRON_BYTES).split(b"\0")
        except OSError:
            return False

    def alive(self) -> bool:
        """Check that the process runs, in this group; another one with the same pid is not taken for it."""
        try:
            # The command, in parentheses, may contain anything; what follows it does not.
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return False
        state, group, session, start_ticks = fields[0], int(fields[2]), int(fields[3]), fields[19]
        return (
            state not in "ZX"
            and group == session == self.group
            and start_ticks == self.start_ticks
            and boot_id == self.boot_id
        )


@dataclass(frozen=True, slots=True)
class LocalJob:
    """The directory of one pilot, named after its stamp."""

    path: Path
    account: Account | None = None  # of the pilot; None: the worker's own

    @property
    def work(self) -> Path:
        """The directory that the pilot runs in."""
        return self.path / "work"

    def create(self, script: str, secret: str | None = None) -> bool:
        """Make the directory with the pilot script; False when it exists: the pilot was submitted before.

        Args:
            script: of the pilot.
            secret: of the pilot, for a file in its own directory that nobody else can read; None: it has none.

        Raises:
            OSError: it could not be made.
            CEUnavailableError: neither made nor looked at: it may have been submitted before.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.account is not None:
            self.path.parent.chmod(0o711)
        prepared = Path(tempfile.mkdtemp(prefix=".new-", dir=self.path.parent))
        try:
            (prepared / "script").write_text(executable_script(script))
            if self.account is not None:
                self.account.prepare(prepared)
            if secret is not None:
                _write_secret(prepared / "work", secret)
            prepared.rename(self.path)
        except OSError:
            shutil.rmtree(prepared, ignore_errors=True)
            try:
                if modified_at(self.path) is not None and self.path.is_dir():
                    return False
            except OSError as error:
                raise CEUnavailableError(str(error)) from error
            raise
        return True

    def launch(self, environment: Mapping[str, str]) -> None:
        """Start the wrapper in a session of its own: it outlives the worker.

        Raises:
            OSError, subprocess.SubprocessError: it could not be started; the directory is gone again.
            CEUnavailableError: it may have been started.
        """
        command = [] if self.account is None else self.account.command
        try:
            subprocess.run(
                ["/bin/sh", "-c", '/bin/sh "$@" &', "launch", str(WRAPPER), str(self.path), *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=dict(environment),
                start_new_session=True,
                check=True,
                timeout=LAUNCH_TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            message = f"pilot {self.path.name}: not known after {LAUNCH_TIMEOUT_SECONDS} s whether it was started"
            raise CEUnavailableError(message) from error
        except (OSError, subprocess.SubprocessError):
            self.remove()
            raise

    def observe(self, *, start_seconds: float) -> Observation | None:
        """The observed state of the pilot; None: there is no such directory.

        Raises:
            OSError: it cannot be read now.
        """
        # In this order: it may end meanwhile, and one that writes an exit code while it runs has not ended.
        process = self._process()
        if process is not None and process.alive():
            return Observation(Observed.RUNNING)
        code = self._exit_code()
        if code is None and process is None:
            return self._not_started(start_seconds)
        cancelled = modified_at(self.path / "cancelled") is not None
        return observed_end(code, cancelled=cancelled, last_line=self._last_line_of_stderr)

    def cancel(self, *, kill_after_seconds: float) -> None:
        """Ask the pilot to end (SIGTERM); asked again after `kill_after_seconds`, make it end (SIGKILL).

        Raises:
            OSError: its directory cannot be read now, or not marked, as on a full disk: it was asked all the same.
        """
        if not self._is_there():
            return
        process = self._process()
        alive = process is not None and process.alive()
        if not alive and self._exit_code() is not None:
            return
        mark, unmarked = self.path / "cancelled", None
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            pass
        except OSError as error:
            unmarked = error
        # Without a process file the wrapper has yet to look for the mark.
        if process is not None and alive:
            if process.belongs_to(self.path.name):
                cancelled_at = time.time() if unmarked else modified_at(mark) or 0.0
                kill = time.time() - cancelled_at >= kill_after_seconds
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.group, signal.SIGKILL if kill else signal.SIGTERM)
            else:
                logger.warning("Process %d is not of the pilot %s, which says so", process.pid, self.path.name)
        if unmarked is not None:
            raise unmarked

    def output(self) -> PilotOutput:
        """Read stdout and stderr of the pilot.

        Raises:
            FileNotFoundError: there is no such directory.
            OSError: they cannot be read now.
        """
        if not self._is_there():
            raise FileNotFoundError(self.path)
        return PilotOutput(*(self._tail(name, OUTPUT_LIMIT_BYTES) for name in ("stdout", "stderr")))

    def mark_forgotten(self) -> None:
        """Have the directory swept away when its time is over."""
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            (self.path / "forgotten").touch(exist_ok=False)

    def remove(self) -> None:
        """Delete the directory."""
        shutil.rmtree(self.path, ignore_errors=True)

    def wrote_before(self, name: str, timestamp: float) -> bool:
        """True if such a file exists and was written before then (s since 1970)."""
        written_at = modified_at(self.path / name)
        return written_at is not None and written_at <= timestamp

    def _is_there(self) -> bool:
        return modified_at(self.path) is not None and self.path.is_dir() and not self.path.is_symlink()

    def _not_started(self, start_seconds: float) -> Observation | None:
        made_at = modified_at(self.path)
        if made_at is None:
            return None
        if time.time() - made_at < start_seconds:
            return Observation(Observed.WAITING)
        return Observation(Observed.FAILED, "the pilot process was never started")

    def _exit_code(self) -> int | None:
        try:
            return int(read_start(self.path, "rc", _MAX_CODE_BYTES))
        except OSError as error:
            raise_unless_absent(error)
            return None
        except ValueError:
            return 1  # a full disk leaves an empty file: it ended, and not well

    def _process(self) -> _Process | None:
        try:
            pid, group, start_ticks, boot_id = read_start(self.path, "pid", _MAX_PID_BYTES).decode().split()
            process = _Process(int(pid), int(group), start_ticks, boot_id)
        except OSError as error:
            raise_unless_absent(error)
            return None
        except ValueError:
            return None
        # A signal to the groups 0 and 1 would reach far more than a pilot.
        return process if process.pid > 1 and process.group > 1 else None

    def _last_line_of_stderr(self) -> str:
        lines = self._tail("stderr", _MAX_STDERR_BYTES).split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:_MAX_STDERR_CHARS]

    def _tail(self, name: str, limit_bytes: int) -> str:
        try:
            return read_end(self.path, name, limit_bytes).decode(errors="replace")
        except OSError as error:
            raise_unless_absent(error)
            return ""  # the pilot has not come so far, or has put something else there


def _write_secret(work: Path, secret: str) -> None:
    """Write the secret for the owner of this directory, which is not the pilot's to change yet."""
    work.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(work / SECRET_FILE, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret)
        owner = work.stat()
        os.fchown(file.fileno(), owner.st_uid, owner.st_gid)


def sweep(directory: Path, *, keep_seconds: float) -> None:
    """Delete the jobs below `directory` that were marked as forgotten so long ago, and those that ended a month
    before that and were never heard of again."""
    now = time.time()
    for path in directory.glob("*/script"):
        job = LocalJob(path.parent)
        with contextlib.suppress(OSError):
            if not path.parent.is_symlink() and (
                job.wrote_before("forgotten", now - keep_seconds)
                or job.wrote_before("rc", now - keep_seconds - _UNHEARD_OF_SECONDS)
            ):
                job.remove()
