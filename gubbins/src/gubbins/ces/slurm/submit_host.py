"""Pilots as jobs of a batch system that is commanded on a submit host; each has a directory there."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

from gubbins.ces.protocol import (
    OUTPUT_LIMIT_BYTES,
    CEBackend,
    CEDescription,
    Observation,
    Observed,
    PilotAtCE,
    PilotOutput,
    SubmitOutcome,
)
from gubbins.ces.transports.shell import Completed, LocalShell, Shell, inherited_environment
from gubbins.ces.transports.ssh import SSHShell
from gubbins.domain.exceptions import CEUnavailableError, OutputUnavailableError

from .error_parsing import error_line
from .jobs import Job, Record, is_reference, judge, parse_records
from .settings import SubmitHostSettings

_HERE = Path(__file__).parent
_MINUTES_OF_A_DAY = 24 * 60
_NOT_THERE = 66  # of output.sh and look.sh
_NOT_BEGUN, _NOT_KNOWN, _TIMED_OUT = 73, 75, 124  # of submit.sh

SettingsT = TypeVar("SettingsT", bound=SubmitHostSettings)


class Submission(NamedTuple):
    """The command that submits a pilot; see `submit.sh`."""

    argv: list[str]
    script: bytes
    """The job, for its standard input."""
    number: str
    """A sed script that prints the job's number of a line that is one."""
    find: str
    """Shell text that prints the numbers of the pilot's jobs in the queue."""
    secret: str = ""
    """The pilot's, for a file in its directory, where others may see the script of a job; empty: there is none."""


class SubmitHostBackend(CEBackend[SettingsT]):
    """A batch system commanded on a submit host, which has a directory for each pilot.

    The reference of a pilot is its job's number. A stamp is submitted at most once: a lock and the job's number
    are kept in the pilot's directory, and the queue is searched by name after an unconfirmed submission. A job
    that has left the queue is unknown, unless its exit code is in that directory.
    """

    operator_only = True

    def __init__(
        self,
        ce: CEDescription,
        settings: SettingsT,
        shell: Shell | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(ce, settings)
        if shell is None and settings.ssh is not None:
            shell = SSHShell(settings.ssh, environment)
        self._shell = shell or LocalShell(inherited_environment() | dict(environment or {}))

    @property
    def has_directories(self) -> bool:
        """True if the nodes have the pilots' directories."""
        return True

    @abstractmethod
    def submission(self, pilot: PilotAtCE) -> Submission:
        """The command that submits this pilot."""

    @abstractmethod
    def refusal(self, done: Completed) -> SubmitOutcome | None:
        """The outcome that a failed submission reports; None: nobody knows whether the job was submitted."""

    @abstractmethod
    async def queue(self, pilots: Sequence[PilotAtCE]) -> dict[str, list[Job]]:
        """All jobs of this user, by stamp."""

    @abstractmethod
    async def completions(
        self, pilots: Sequence[PilotAtCE], records: Mapping[str, Record]
    ) -> tuple[dict[str, list[Job]], bool]:
        """Jobs that have ended and that the queue has forgotten, by stamp; whether all could be asked."""

    @abstractmethod
    async def cancel_jobs(self, jobs: Iterable[Job]) -> None:
        """Cancel these jobs."""

    async def submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        turns = asyncio.Semaphore(self.settings.concurrent_submissions)

        async def one(pilot: PilotAtCE) -> SubmitOutcome:
            async with turns:
                return await self._submit(pilot)

        tasks = [asyncio.ensure_future(one(pilot)) for pilot in pilots]
        try:
            outcomes = await asyncio.gather(*tasks)
        except BaseException:
            # A site that did not respond to one gets no more.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        stamps = (pilot.stamp for pilot in pilots)
        answer = dict(zip(stamps, outcomes, strict=True))
        refused = [("remove", stamp) for stamp, outcome in answer.items() if outcome.error is not None]
        await self.side_source(self._tidy(refused))
        return answer

    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        if not pilots:
            return {}
        jobs = await self.queue(pilots)
        over = [pilot for pilot in pilots if not any(job.active for job in jobs.get(pilot.stamp, ()))]
        looked = await self.side_source(self._look(over))
        records, unreadable = parse_records(looked or "")
        for stamp, why in unreadable.items():
            self.warn(f"the directory of {stamp}: {why}")
        forgotten = [
            pilot
            for pilot in over
            if pilot.stamp not in jobs and not ((record := records.get(pilot.stamp)) and record.exit_code)
        ]
        completions, all_asked = await self.completions(forgotten, records)
        jobs |= completions
        all_known = looked is not None and all_asked
        silent = set(unreadable if all_known else (pilot.stamp for pilot in forgotten)) - set(jobs)
        seen = (
            (pilot.stamp, judge(jobs.get(pilot.stamp, ()), records.get(pilot.stamp), reference=pilot.reference))
            for pilot in pilots
        )
        known = {stamp: observation for stamp, observation in seen if observation is not None}
        return dict.fromkeys(silent, Observation(Observed.NO_NEWS)) | known

    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        if not pilots:
            return
        jobs = await self.queue(pilots)
        active = {pilot.stamp: [job for job in jobs.get(pilot.stamp, ()) if not job.ended] for pilot in pilots}
        await self.side_source(self._tidy(("cancelled", stamp) for stamp, own in active.items() if own))
        await self.cancel_jobs(chain.from_iterable(active.values()))

    async def output(self, pilot: PilotAtCE) -> PilotOutput:
        if not self.has_directories:
            raise OutputUnavailableError(pilot.stamp, f"the nodes of {self.ce.name} have no directory for it")
        texts = []
        for name in ("stdout", "stderr"):
            arguments = [str(self.settings.directory), pilot.stamp, name, str(OUTPUT_LIMIT_BYTES)]
            done = await self.run_command([*_script("output"), *arguments], what=f"the output of {pilot.stamp}")
            if done.returncode == _NOT_THERE:
                raise OutputUnavailableError(pilot.stamp, "its directory is gone, or never was")
            texts.append(text_of(done, "output"))
        return PilotOutput(*texts)

    async def cleanup(self, pilots: Sequence[PilotAtCE]) -> None:
        await self._tidy(
            (("ended" if self.settings.keeps(pilot.status) else "remove", pilot.stamp) for pilot in pilots),
            remove_after_minutes=str(round(self.settings.keep_days * _MINUTES_OF_A_DAY)),
        )

    async def close(self) -> None:
        await self._shell.close()

    async def _submit(self, pilot: PilotAtCE) -> SubmitOutcome:
        seconds = f"{self.settings.timeout_seconds:g}"
        how = self.submission(pilot)
        command = how.argv[0].rpartition("/")[2]
        arguments = [str(self.settings.directory), pilot.stamp, seconds, how.number, how.find, *how.argv]
        stdin = f"{how.secret}\n".encode() + how.script
        done = await self.run_command([*_script("submit"), *arguments], stdin, what=command)
        reference = done.stdout.strip()
        if done.returncode == 0 and is_reference(reference):
            return SubmitOutcome(reference=reference)
        if done.returncode == _TIMED_OUT:
            raise CEUnavailableError(f"{command} has not answered within {seconds} s")
        if done.returncode == _NOT_BEGUN:
            return SubmitOutcome(error=f"the directory of {self.ce.name}: {error_line(done)}")
        refused = self.refusal(done) if done.returncode not in (0, _NOT_KNOWN) else None
        if refused is None:
            raise CEUnavailableError(f"{command}: {error_line(done)}")
        return refused

    async def _look(self, pilots: Sequence[PilotAtCE]) -> str:
        """Read the directories of these pilots; nothing where none of them can have one."""
        if not pilots or not self.has_directories:
            return ""
        what = f"the directory of {self.ce.name}"
        argv = [*_script("look"), str(self.settings.directory)]
        done = await self.run_command(argv, lines_of(pilot.stamp for pilot in pilots), what=what)
        if done.returncode == _NOT_THERE and not any(pilot.reference for pilot in pilots):
            return ""
        return text_of(done, what)

    async def _tidy(self, lines: Iterable[tuple[str, str]], *, remove_after_minutes: str = "") -> None:
        text = "".join(f"{what} {stamp}\n" for what, stamp in lines)
        if text:
            what = f"the directory of {self.ce.name}"
            argv = [*_script("tidy"), str(self.settings.directory), remove_after_minutes]
            text_of(await self.run_command(argv, text.encode(), what=what), what)

    async def run_command(self, argv: Sequence[str], stdin: bytes = b"", *, what: str | None = None) -> Completed:
        """Run a command there; `what` it is in errors, in place of the shell that runs our script."""
        try:
            return await self._shell.run(argv, stdin=stdin, timeout=self.settings.timeout_seconds)
        except CEUnavailableError as error:
            raise CEUnavailableError(str(error).replace(argv[0], what or argv[0], 1)) from error

    def command(self, name: str, *arguments: str) -> list[str]:
        """A command of the batch system."""
        return [name if self.settings.commands is None else str(self.settings.commands / name), *arguments]


def _script(name: str) -> list[str]:
    """The beginning of a command that runs one of our scripts, wherever that is."""
    return ["/bin/sh", "-c", _HERE.joinpath(f"{name}.sh").read_text(), name]


def lines_of(stamps: Iterable[str]) -> bytes:
    return "".join(f"{stamp}\n" for stamp in stamps).encode()


def text_of(done: Completed, what: str) -> str:
    """The output of a command that has to succeed.

    Raises:
        CEUnavailableError: it has not.
    """
    if done.returncode != 0:
        raise CEUnavailableError(f"{what}: {error_line(done)} (exit code {done.returncode})")
    return done.stdout
