"""Base of the back ends `local` and `ssh`."""

from __future__ import annotations

import contextlib
import math
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import Field

from gubbins.ces.directories.backend import DirectoryBackend, DirectorySettings, is_stamp, text_of_script
from gubbins.ces.protocol import (
    CEDescription,
    NothingDoneError,
    Observation,
    Observed,
    PilotAtCE,
    SubmitOutcome,
    batches,
)
from gubbins.ces.transports.shell import Shell
from gubbins.domain.exceptions import CEUnavailableError
from gubbins.domain.text import one_line

_CONCURRENT_SUBMISSIONS = 4  # commands; sshd has at most 10 sessions of one connection
_REFUSED = 73  # exit code of jobs.sh
_FUNCTIONS = Path(__file__).with_name("jobs.sh").read_text()
WRAPPER = Path(__file__).with_name("wrapper.sh").read_text()


class Refused(NothingDoneError):
    """The host has refused the command."""


class ProcessSettings(DirectorySettings):
    """Settings of a compute element that runs pilots as processes of one host."""

    kill_after_seconds: float = Field(
        default=10, ge=0, allow_inf_nan=False, description="Time from SIGTERM to SIGKILL for a cancelled pilot."
    )
    # A wrapper writes its pid within milliseconds.
    start_seconds: float = Field(
        default=60,
        ge=0,
        allow_inf_nan=False,
        description="Time limit for the start of a pilot process; then it is FAILED.",
    )


SettingsT = TypeVar("SettingsT", bound=ProcessSettings)


class ProcessBackend(DirectoryBackend[SettingsT]):
    """Runs pilots as processes of a Linux host. Exit code 0 is DONE, all others are FAILED.

    All state is in the directories of pilots, which survive restarts of the worker. A command is for up to
    `pilots_per_command` pilots.

    Args:
        shell: runs commands on the host.
        host: name of the host.
        port: port of the host, for messages and references.
        directory: directory of the pilots' directories on the host.
        timeout_seconds: time limit of a command.
    """

    scheme: ClassVar[str]
    """Scheme of references."""
    file_of_pilots = "script"
    pilots_per_command = 200

    def __init__(
        self,
        ce: CEDescription,
        settings: SettingsT,
        shell: Shell,
        *,
        host: str,
        directory: str,
        timeout_seconds: float,
        port: int | None = None,
    ) -> None:
        super().__init__(ce, settings, shell, directory=directory, timeout_seconds=timeout_seconds)
        self._host_name = host
        self._host = host if port is None else f"{host}:{port}"

    def preparation(self) -> list[str]:
        """Lines of shell text before a submission, which may change `$owner`, `$run_as` and `$environment`.

        Raises:
            Refused: no pilot can be submitted.
        """
        return []

    def reference(self, stamp: str) -> str:
        """The reference of a pilot."""
        return f"{self.scheme}://{self._host}/{stamp}"

    async def submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        alike: dict[tuple[str, str], list[PilotAtCE]] = defaultdict(list)
        for pilot in pilots:
            alike[pilot.vo, pilot.identity.url if pilot.identity else ""].append(pilot)
        parts = [part for own in alike.values() for part in batches(own, self.pilots_per_command)]
        return await self.gather_outcomes(self._submit, parts, at_once=_CONCURRENT_SUBMISSIONS)

    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        async def poll(part: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
            observations = {}
            with _ignore_missing_directory(pilots):
                for word, rest in await self._run(part, lambda pilot: f"observe {pilot.stamp}"):
                    stamp, _, detail = rest.partition(" ")
                    try:
                        observations[stamp] = self._observation(stamp, word, detail)
                    except ValueError as error:
                        raise CEUnavailableError(f"{self._host}: invalid response: {one_line(rest)}") from error
            return observations

        observations, silent = await self.poll_parts(poll, batches(pilots, self.pilots_per_command))
        return observations | {pilot.stamp: Observation(Observed.NO_NEWS) for pilot in silent}

    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        times = f"now=$(date +%s) kill_after={math.ceil(self.settings.kill_after_seconds)}"
        with _ignore_missing_directory(pilots):
            for part in batches(pilots, self.pilots_per_command):
                for _, rest in await self._run(part, lambda pilot: f"cancel {pilot.stamp}", times):
                    self.warn(f"{self._host}: {rest}")

    async def _submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome | Exception]:
        """Submit pilots of one VO, all with an identity of the same service or all without, by one command."""
        vo, stamps = pilots[0].vo, [pilot.stamp for pilot in pilots]
        variables = self.settings.variables(self.ce.name, vo, identity=pilots[0].identity)

        def line(pilot: PilotAtCE) -> str:
            return f"secret={quote(pilot.identity.secret if pilot.identity else '')}\nsubmit {pilot.stamp}"

        records = await self._run(
            pilots,
            line,
            f"script={quote(self.settings.executable(vo))}",
            f"wrapper={quote(WRAPPER)}",
            f"environment={quote(exports(variables))}",
            *self.preparation(),
            f"prepare {quote(self._directory)}",
        )
        outcomes: dict[str, SubmitOutcome | Exception] = {
            stamp: CEUnavailableError(f"{self._host}: no outcome of a submission")
            if is_stamp(stamp)
            else SubmitOutcome(error=f"{stamp!r} cannot be the name of a directory")
            for stamp in stamps
        }
        for word, rest in records:
            stamp, _, why = rest.partition(" ")
            if word == "unreadable":
                outcomes[stamp] = CEUnavailableError(f"{self._host}: {one_line(why)}")
            elif word == "refused":
                outcomes[stamp] = SubmitOutcome(error=one_line(why) or "the host gives no reason")
            elif word == "submitted":
                outcomes[stamp] = SubmitOutcome(reference=self.reference(stamp))
        return outcomes

    async def _run(
        self, pilots: Iterable[PilotAtCE], line: Callable[[PilotAtCE], str], *before: str
    ) -> list[tuple[str, str]]:
        """Run a command with these lines and one for each pilot, and return the printed words, and their data.

        Pilots with invalid stamps are skipped.

        Raises:
            Refused: nothing was done.
            CEUnavailableError: no response to the command, which may have been run.
        """
        part = [pilot for pilot in pilots if is_stamp(pilot.stamp)]
        if not part:
            return []
        enter = f"enter {quote(self._directory)}"
        find = f"find_bad_files {' '.join(pilot.stamp for pilot in part)}"
        lines = ["{", _FUNCTIONS, *before, enter, find, *map(line, part), "exit 0", "} < /dev/null\n"]
        text = "\n".join(lines).encode(errors="replace")
        done = await self._shell.run(["/bin/sh", "-s"], stdin=text, timeout=self._timeout_seconds)
        if done.returncode == _REFUSED:
            raise Refused(f"{self._host}: {one_line(done.stderr)}")
        printed = text_of_script(done, self._host).split("\n")
        return [(word, data) for word, _, data in (line.partition(" ") for line in printed) if word]

    def _observation(self, stamp: str, word: str, detail: str) -> Observation:
        state, reason = Observed.NO_NEWS, None
        match word:
            case "prepared" if int(detail) < self.settings.start_seconds:
                state = Observed.WAITING
            case "prepared":
                state, reason = Observed.FAILED, "the pilot process was never started"
            case "running":
                state = Observed.RUNNING
            case "unreadable":
                self.warn(f"{self._host}: {detail}")
            case "elsewhere":
                reason = f"it runs on {one_line(detail)}, but {self._host_name} is another host now"
            case "restarted":
                state, reason = Observed.FAILED, "the host was restarted while it ran"
            case "ended":
                code, cancelled, line = detail.split(" ", 2)
                state, reason = _end(code, cancelled == "1", one_line(line))
        return Observation(state, reason, self.reference(stamp))


def quote(value: str) -> str:
    """Quote any value as one word of a POSIX shell; NUL characters are dropped."""
    return shlex.quote(value.replace("\0", ""))


def exports(variables: Mapping[str, str]) -> str:
    """Make lines that export variables."""
    return "".join(f"{name}={quote(value)}\nexport {name}\n" for name, value in variables.items())


def _end(code: str, cancelled: bool, last_line: str) -> tuple[Observed, str | None]:
    """State and reason of a pilot whose process has ended with this code; `-`: without one."""
    if code == "-":
        return Observed.FAILED, "cancelled" if cancelled else "the process vanished without an exit code"
    if int(code) == 0:
        return Observed.DONE, None
    reason = f"cancelled (exit code {int(code)})" if cancelled else f"exit code {int(code)}"
    return Observed.FAILED, f"{reason}: {last_line}" if last_line else reason


@contextlib.contextmanager
def _ignore_missing_directory(pilots: Iterable[PilotAtCE]) -> Iterator[None]:
    """Ignore a missing directory unless there are confirmed pilots: it may not be mounted then."""
    try:
        yield
    except Refused:
        if any(pilot.reference for pilot in pilots):
            raise
