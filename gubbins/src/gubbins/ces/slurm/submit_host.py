"""Base of back ends for batch systems with commands on a submit host, and a directory there for each pilot."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

from gubbins.ces.directories.backend import DirectoryBackend, script, text_of_script
from gubbins.ces.protocol import (
    CEDescription,
    Observation,
    Observed,
    PilotAtCE,
    PilotOutput,
    SubmitOutcome,
    batches,
)
from gubbins.ces.transports.shell import Completed, LocalShell, Shell, inherited_environment
from gubbins.ces.transports.ssh import SSHShell
from gubbins.domain.exceptions import CEUnavailableError, OutputUnavailableError

from .error_parsing import error_line, is_unreachable
from .jobs import Job, Jobs, Record, is_reference, observe_jobs, parse_records
from .settings import SubmitHostSettings

_HERE = Path(__file__).parent
# Exit codes of records.sh, and of submit.sh.
_NOT_FOUND = 66
_NOT_SUBMITTED, _UNKNOWN, _TIMED_OUT = 73, 75, 124

SettingsT = TypeVar("SettingsT", bound=SubmitHostSettings)


class Submission(NamedTuple):
    """Arguments of `submit.sh`."""

    argv: list[str]
    """Command that submits the job."""
    script: bytes
    """Script of the job, for its stdin."""
    number: str
    """Sed script that extracts the job number from its output."""
    find: str
    """Shell command that prints the numbers of the pilot's jobs in the queue."""
    secret: str = ""
    """Secret of the pilot, to be written to its directory if others may see the script."""


class SubmitHostBackend(DirectoryBackend[SettingsT]):
    """A batch system with commands on a submit host, and a directory there for each pilot.

    The reference of a pilot is its job number. A stamp is submitted at most once: the pilot's directory has a lock
    and the job number, and the queue is searched after an unconfirmed submission. A job that has left the queue is
    unknown, unless its exit code is in that directory.
    """

    has_directories = True
    """True if the nodes have the pilots' directories."""
    misleading_variables: ClassVar[str] = ""
    """Extended regular expression of variables of an account that change what our commands do."""

    def __init__(
        self,
        ce: CEDescription,
        settings: SettingsT,
        shell: Shell | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if shell is None and settings.ssh is not None:
            shell = SSHShell(settings.ssh, environment, unset=self.misleading_variables)
        super().__init__(
            ce,
            settings,
            shell or LocalShell(inherited_environment() | dict(environment or {})),
            directory=str(settings.directory),
            timeout_seconds=settings.timeout_seconds,
        )

    @abstractmethod
    def submission(self, pilot: PilotAtCE) -> Submission:
        """The command that submits this pilot."""

    @abstractmethod
    def refusal(self, done: Completed) -> SubmitOutcome | None:
        """The outcome that a failed submission reports; None: unknown whether the job was submitted."""

    @abstractmethod
    async def queue(self, pilots: Sequence[PilotAtCE]) -> Jobs:
        """List all jobs of this user, by stamp."""

    @abstractmethod
    async def completions(self, pilots: Sequence[PilotAtCE], records: Mapping[str, Record]) -> tuple[Jobs, bool]:
        """Find ended jobs that the queue does not list, by stamp; and whether all sources have responded."""

    @abstractmethod
    async def cancel_jobs(self, jobs: Iterable[Job]) -> None:
        """Cancel these jobs."""

    async def submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        refused = []

        async def submit(part: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
            (pilot,) = part
            outcome = await self._submit(pilot)
            if outcome.error is not None:
                refused.append(("remove", pilot.stamp))
            return {pilot.stamp: outcome}

        parts, at_once = batches(pilots, 1), self.settings.concurrent_submissions
        response = await self.gather_outcomes(submit, parts, at_once=at_once)
        await self.secondary_source(self.clean_directories(refused))
        return response

    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        if not pilots:
            return {}
        jobs = await self.queue(pilots)
        inactive = [pilot for pilot in pilots if not any(job.active for job in jobs.get(pilot.stamp, ()))]
        output = await self.secondary_source(self._read_records(inactive))
        records, unreadable = parse_records(output or "")
        for stamp, error in unreadable.items():
            self.warn(f"the directory of {stamp}: {error}")
        unlisted = [
            pilot
            for pilot in inactive
            if pilot.stamp not in jobs and not ((record := records.get(pilot.stamp)) and record.exit_code)
        ]
        completions, all_responded = await self.completions(unlisted, records)
        jobs |= completions
        complete = output is not None and all_responded
        no_news = set(unreadable if complete else (pilot.stamp for pilot in unlisted)) - set(jobs)
        observed = dict.fromkeys(no_news, Observation(Observed.NO_NEWS))
        for pilot in pilots:
            own, record = jobs.get(pilot.stamp, ()), records.get(pilot.stamp)
            if (seen := observe_jobs(own, record, reference=pilot.reference)) is not None:
                observed[pilot.stamp] = seen
        return observed

    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        if not pilots:
            return
        jobs = await self.queue(pilots)
        active = {pilot.stamp: [job for job in jobs.get(pilot.stamp, ()) if not job.ended] for pilot in pilots}
        await self.secondary_source(
            self.clean_directories(("cancelled", stamp) for stamp, own in active.items() if own)
        )
        await self.cancel_jobs(chain.from_iterable(active.values()))

    async def output(self, pilot: PilotAtCE) -> PilotOutput:
        if not self.has_directories:
            raise OutputUnavailableError(pilot.stamp, f"the nodes of {self.ce.name} have no directory for it")
        return await super().output(pilot)

    async def _submit(self, pilot: PilotAtCE) -> SubmitOutcome:
        seconds = f"{self.settings.timeout_seconds:g}"
        job = self.submission(pilot)
        command = job.argv[0].rpartition("/")[2]
        arguments = [str(self.settings.directory), pilot.stamp, seconds, job.number, job.find, *job.argv]
        stdin = f"{job.secret}\n".encode() + job.script
        done = await self.run_command([*script("submit", _HERE), *arguments], stdin, what=command)
        reference = done.stdout.strip()
        if done.returncode == 0 and is_reference(reference):
            return SubmitOutcome(reference=reference)
        if done.returncode == _TIMED_OUT:
            raise CEUnavailableError(f"{command} has not responded within {seconds} s")
        if done.returncode == _NOT_SUBMITTED:
            return SubmitOutcome(error=f"the directory of {self.ce.name}: {error_line(done)}")
        refused = self.refusal(done) if done.returncode not in (0, _UNKNOWN) else None
        if refused is None:
            raise CEUnavailableError(f"{command}: {error_line(done)}")
        return refused

    async def _read_records(self, pilots: Sequence[PilotAtCE]) -> str:
        """Read the directories of these pilots."""
        if not pilots or not self.has_directories:
            return ""
        what = f"the directory of {self.ce.name}"
        argv = [*script("records", _HERE), str(self.settings.directory)]
        done = await self.run_command(argv, lines_of(pilot.stamp for pilot in pilots), what=what)
        if done.returncode == _NOT_FOUND and not any(pilot.reference for pilot in pilots):
            return ""
        return text_of_script(done, what)

    def command(self, name: str, *arguments: str) -> list[str]:
        """Make a command of the batch system, with its directory."""
        return [name if self.settings.commands is None else str(self.settings.commands / name), *arguments]


def lines_of(stamps: Iterable[str]) -> bytes:
    return "".join(f"{stamp}\n" for stamp in stamps).encode()


def jobs_of(done: Completed, what: str, parse: Callable[[str], Jobs], listing: str = "") -> Jobs:
    """Parse the output of a command; `listing` is a pattern of it, unlike that of a message in its place.

    Raises:
        CEUnavailableError: it failed, or has exit code 0 and an error in place of jobs.
    """
    jobs = parse(done.stdout) if done.returncode == 0 else {}
    listed = re.search(listing, done.stdout, re.MULTILINE)
    complete = listed and (jobs or listed[0].strip() or not is_unreachable(done))
    if done.returncode != 0 or not complete:
        raise CEUnavailableError(f"{what}: {error_line(done)} (exit code {done.returncode})")
    return jobs
