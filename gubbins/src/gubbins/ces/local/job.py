"""Jobs of the back end `local`: one directory and process group per pilot. Blocking; called in a thread."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gubbins.ces.protocol import OUTPUT_LIMIT_BYTES, Observation, Observed, PilotOutput, observation_of_exit
from gubbins.ces.settings import SECRET_FILE, executable_script
from gubbins.domain.exceptions import CEUnavailableError

from .account import Account
from .files import modified_at, raise_unless_absent, read_end, read_start

logger = logging.getLogger(__name__)

WRAPPER = Path(__file__).with_name("wrapper.sh")
LAUNCH_TIMEOUT_SECONDS = 30
_ORPHAN_SECONDS = 30 * 24 * 3600
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
        """Check that the process, or another one of its group, has the stamp of the pilot in its environment.

        A pilot could write the pid of any other process to its directory.
        """
        return any(_has_stamp(pid, stamp) for pid in (self.pid, *self._members()))

    def alive(self) -> bool:
        """Check that the process is running, and not another one with the same pid."""
        fields = _stat(self.pid)
        return self._of_this_boot() and self._includes(fields) and fields[19] == self.start_ticks

    def group_alive(self, stamp: str) -> bool:
        """Check that processes of the pilot's group are running, also after the end of the process itself."""
        return self._of_this_boot() and any(_has_stamp(pid, stamp) for pid in self._members())

    def _of_this_boot(self) -> bool:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() == self.boot_id

    def _includes(self, fields: Sequence[str]) -> bool:
        return bool(fields) and fields[0] not in "ZX" and fields[2] == fields[3] == str(self.group)

    def _members(self) -> Iterator[int]:
        try:
            os.killpg(self.group, 0)  # most groups have ended
        except ProcessLookupError:
            return
        pids = (int(name) for name in os.listdir("/proc") if name.isdecimal())
        yield from (pid for pid in pids if self._includes(_stat(pid)))


@dataclass(frozen=True, slots=True)
class LocalJob:
    """Directory of one pilot, named by its stamp."""

    path: Path
    account: Account | None = None  # None: the account of the worker

    @property
    def work(self) -> Path:
        """Working directory of the pilot."""
        return self.path / "work"

    def create(self, script: str, secret: str | None = None) -> bool:
        """Make the directory with the pilot's script and secret; False: it exists, the pilot was submitted before.

        Raises:
            OSError: it could not be made.
            CEUnavailableError: it cannot be accessed: the pilot may have been submitted before.
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
        """Start the wrapper in a session of its own, so that it outlives the worker.

        Raises:
            OSError, subprocess.SubprocessError: it could not be started; the directory was removed.
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
            message = f"pilot {self.path.name}: unknown after {LAUNCH_TIMEOUT_SECONDS} s whether it was started"
            raise CEUnavailableError(message) from error
        except (OSError, subprocess.SubprocessError):
            self.remove()
            raise

    def observe(self, *, start_seconds: float) -> Observation | None:
        """Observe the state of the pilot; None: there is no such directory.

        Raises:
            OSError: the directory cannot be read.
        """
        # The process first, since it may end meanwhile, and a running pilot could write an exit code.
        process = self._process()
        if process is not None and process.alive():
            return Observation(Observed.RUNNING)
        code = self._exit_code()
        if code is None and process is None:
            return self._not_started(start_seconds)
        if code is None and process is not None and process.group_alive(self.path.name):  # without the wrapper
            return Observation(Observed.RUNNING)
        cancelled = modified_at(self.path / "cancelled") is not None
        return observation_of_exit(code, cancelled=cancelled, last_line=self._last_line_of_stderr)

    def cancel(self, *, kill_after_seconds: float) -> None:
        """Send SIGTERM to the pilot, or SIGKILL if it was cancelled more than `kill_after_seconds` ago.

        Raises:
            OSError: the directory cannot be read; or the mark could not be written (full disk), the signal was
                sent.
        """
        if not self._exists():
            return
        process = self._process()
        alive = process is not None and process.alive()
        if not alive and self._exit_code() is not None:
            return
        alive = alive or (process is not None and process.group_alive(self.path.name))
        mark, mark_error = self.path / "cancelled", None
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            pass
        except OSError as error:
            mark_error = error
        # If there is no process file yet, the wrapper will find the mark.
        if process is not None and alive:
            if process.belongs_to(self.path.name):
                cancelled_at = time.time() if mark_error else modified_at(mark) or 0.0
                kill = time.time() - cancelled_at >= kill_after_seconds
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.group, signal.SIGKILL if kill else signal.SIGTERM)
            else:
                logger.warning("Process %d does not belong to pilot %s", process.pid, self.path.name)
        if mark_error is not None:
            raise mark_error

    def output(self) -> PilotOutput:
        """Read stdout and stderr of the pilot.

        Raises:
            FileNotFoundError: there is no such directory.
            OSError: they cannot be read.
        """
        if not self._exists():
            raise FileNotFoundError(self.path)
        return PilotOutput(*(self._tail(name, OUTPUT_LIMIT_BYTES) for name in ("stdout", "stderr")))

    def mark_for_sweep(self) -> None:
        """Mark the directory for removal by `sweep`, without the secret and tokens of a pilot that was killed."""
        for path in self.work.glob(".pilot[-.]*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            (self.path / "forgotten").touch(exist_ok=False)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def wrote_before(self, name: str, timestamp: float) -> bool:
        """True if the file exists and was written before that time (s since 1970)."""
        written_at = modified_at(self.path / name)
        return written_at is not None and written_at <= timestamp

    def _exists(self) -> bool:
        return modified_at(self.path) is not None and self.path.is_dir() and not self.path.is_symlink()

    def _not_started(self, start_seconds: float) -> Observation | None:
        created_at = modified_at(self.path)
        if created_at is None:
            return None
        if time.time() - created_at < start_seconds:
            return Observation(Observed.WAITING)
        return Observation(Observed.FAILED, "the pilot process was never started")

    def _exit_code(self) -> int | None:
        try:
            return int(read_start(self.path, "rc", _MAX_CODE_BYTES))
        except OSError as error:
            raise_unless_absent(error)
            return None
        except ValueError:
            return 1  # an empty file, as on a full disk

    def _process(self) -> _Process | None:
        try:
            pid, group, start_ticks, boot_id = read_start(self.path, "pid", _MAX_PID_BYTES).decode().split()
            process = _Process(int(pid), int(group), start_ticks, boot_id)
        except OSError as error:
            raise_unless_absent(error)
            return None
        except ValueError:
            return None
        # Never signal the groups 0 and 1.
        return process if process.pid > 1 and process.group > 1 else None

    def _last_line_of_stderr(self) -> str:
        lines = self._tail("stderr", _MAX_STDERR_BYTES).split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:_MAX_STDERR_CHARS]

    def _tail(self, name: str, limit_bytes: int) -> str:
        try:
            return read_end(self.path, name, limit_bytes).decode(errors="replace")
        except OSError as error:
            raise_unless_absent(error)
            return ""  # does not exist yet, or was replaced by the pilot


def _stat(pid: int) -> Sequence[str]:
    """Read the state of a process (`proc_pid_stat(5)`), from its third field on; empty: there is none."""
    try:
        # The command, in parentheses, may contain anything.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ()


def _has_stamp(pid: int, stamp: str) -> bool:
    try:
        with Path(f"/proc/{pid}/environ").open("rb") as file:
            return f"PILOT_STAMP={stamp}".encode() in file.read(_MAX_ENVIRON_BYTES).split(b"\0")
    except OSError:  # it has ended, or is of another user
        return False


def _write_secret(work: Path, secret: str) -> None:
    """Write the secret to a file of the owner of the directory, before the pilot can change it."""
    work.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(work / SECRET_FILE, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret)
        owner = work.stat()
        os.fchown(file.fileno(), owner.st_uid, owner.st_gid)


def sweep(directory: Path, *, keep_seconds: float) -> None:
    """Delete jobs marked for removal more than `keep_seconds` ago, and jobs that ended 30 days before that."""
    now = time.time()
    for path in directory.glob("*/script"):
        job = LocalJob(path.parent)
        with contextlib.suppress(OSError):
            if not path.parent.is_symlink() and (
                job.wrote_before("forgotten", now - keep_seconds)
                or job.wrote_before("rc", now - keep_seconds - _ORPHAN_SECONDS)
            ):
                job.remove()
