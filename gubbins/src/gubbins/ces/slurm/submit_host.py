"""Base of back ends for batch systems with commands on a submit host, and a directory there for each pilot."""

from __future__ import annotations

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

from .error_parsing import error_line, is_unreachable
from .jobs import Job, Record, is_reference, observe_jobs, parse_records
from .settings import SubmitHostSettings

_HERE = Path(__file__).parent
_MINUTES_OF_A_DAY = 24 * 60
# Exit codes of output.sh and records.sh, and of submit.sh.
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


class SubmitHostBackend(CEBackend[SettingsT]):
    """A batch system with commands on a submit host, and a directory there for each pilot.

    The reference of a pilot is its job number. A stamp is submitted at most once: the pilot's directory has a lock
    and the job number, and the queue is searched after an unconfirmed submission. A job that has left the queue is
    unknown, unless its exit code is in that directory.
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
        """The outcome that a failed submission reports; None: unknown whether the job was submitted."""

    @abstractmethod
    async def queue(self, pilots: Sequence[PilotAtCE]) -> dict[str, list[Job]]:
        """List all jobs of this user, by stamp."""

    @abstractmethod
    async def completions(
        self, pilots: Sequence[PilotAtCE], records: Mapping[str, Record]
    ) -> tuple[dict[str, list[Job]], bool]:
        """Find ended jobs that the queue does not list, by stamp; and whether all sources have responded."""

    @abstractmethod
    async def cancel_jobs(self, jobs: Iterable[Job]) -> None:
        """Cancel these jobs."""

    async def submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        async def submit(pilot: PilotAtCE) -> Mapping[str, SubmitOutcome]:
            return {pilot.stamp: await self._submit(pilot)}

        response = await self.gather_outcomes(submit, pilots, at_once=self.settings.concurrent_submissions)
        refused = [("remove", stamp) for stamp, outcome in response.items() if outcome.error is not None]
        await self.secondary_source(self._clean_directories(refused))
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
        seen = (
            (
                pilot.stamp,
                observe_jobs(jobs.get(pilot.stamp, ()), records.get(pilot.stamp), reference=pilot.reference),
            )
            for pilot in pilots
        )
        known = {stamp: observation for stamp, observation in seen if observation is not None}
        return dict.fromkeys(no_news, Observation(Observed.NO_NEWS)) | known

    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        if not pilots:
            return
        jobs = await self.queue(pilots)
        active = {pilot.stamp: [job for job in jobs.get(pilot.stamp, ()) if not job.ended] for pilot in pilots}
        await self.secondary_source(
            self._clean_directories(("cancelled", stamp) for stamp, own in active.items() if own)
        )
        await self.cancel_jobs(chain.from_iterable(active.values()))

    async def output(self, pilot: PilotAtCE) -> PilotOutput:
        if not self.has_directories:
            raise OutputUnavailableError(pilot.stamp, f"the nodes of {self.ce.name} have no directory for it")
        texts = []
        for name in ("stdout", "stderr"):
            arguments = [str(self.settings.directory), pilot.stamp, name, str(OUTPUT_LIMIT_BYTES)]
            done = await self.run_command([*_script("output"), *arguments], what=f"the output of {pilot.stamp}")
            if done.returncode == _NOT_FOUND:
                raise OutputUnavailableError(pilot.stamp, "its directory does not exist (any more)")
            texts.append(text_of(done, "output"))
        return PilotOutput(*texts)

    async def cleanup(self, pilots: Sequence[PilotAtCE]) -> None:
        await self._clean_directories(
            (("ended" if self.settings.keeps(pilot.status) else "remove", pilot.stamp) for pilot in pilots),
            remove_after_minutes=str(round(self.settings.keep_days * _MINUTES_OF_A_DAY)),
        )

    async def close(self) -> None:
        await self._shell.close()

    async def _submit(self, pilot: PilotAtCE) -> SubmitOutcome:
        seconds = f"{self.settings.timeout_seconds:g}"
        job = self.submission(pilot)
        command = job.argv[0].rpartition("/")[2]
        arguments = [str(self.settings.directory), pilot.stamp, seconds, job.number, job.find, *job.argv]
        stdin = f"{job.secret}\n".encode() + job.script
        done = await self.run_command([*_script("submit"), *arguments], stdin, what=command)
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
        argv = [*_script("records"), str(self.settings.directory)]
        done = await self.run_command(argv, lines_of(pilot.stamp for pilot in pilots), what=what)
        if done.returncode == _NOT_FOUND and not any(pilot.reference for pilot in pilots):
            return ""
        return text_of(done, what)

    async def _clean_directories(
        self, lines: Iterable[tuple[str, str]], *, remove_after_minutes: str = ""
    ) -> None:
        text = "".join(f"{what} {stamp}\n" for what, stamp in lines)
        if text:
            what = f"the directory of {self.ce.name}"
            argv = [*_script("cleanup"), str(self.settings.directory), remove_after_minutes]
            text_of(await self.run_command(argv, text.encode(), what=what), what)

    async def run_command(self, argv: Sequence[str], stdin: bytes = b"", *, what: str | None = None) -> Completed:
        """Run a command on the submit host; `what` replaces its name in errors."""
        try:
            return await self._shell.run(argv, stdin=stdin, timeout=self.settings.timeout_seconds)
        except CEUnavailableError as error:
            raise CEUnavailableError(str(error).replace(argv[0], what or argv[0], 1)) from error

    def command(self, name: str, *arguments: str) -> list[str]:
        """Make a command of the batch system, with its directory."""
        return [name if self.settings.commands is None else str(self.settings.commands / name), *arguments]


def _script(name: str) -> list[str]:
    """Make a command that runs one of our scripts, to be followed by its arguments."""
    return ["/bin/sh", "-c", _HERE.joinpath(f"{name}.sh").read_text(), name]


def lines_of(stamps: Iterable[str]) -> bytes:
    return "".join(f"{stamp}\n" for stamp in stamps).encode()


def text_of(done: Completed, what: str) -> str:
    """Get the output of a command.

    Raises:
        CEUnavailableError: it failed, or has exit code 0 and nothing but an error.
    """
    silent = not done.stdout.strip() and done.stderr.strip() and is_unreachable(done)
    if done.returncode != 0 or silent:
        raise CEUnavailableError(f"{what}: {error_line(done)} (exit code {done.returncode})")
    return done.stdout
