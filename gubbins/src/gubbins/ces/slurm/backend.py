"""The back end `slurm`: sbatch, squeue and scancel, on the host of the worker or through SSH."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

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

from .batch import batch_script, sbatch_options
from .error_parsing import error_line, has_ended, is_unreachable, submission_error
from .jobs import (
    ACCOUNT_FORMAT,
    QUEUE_FORMAT,
    Job,
    cluster_of,
    is_reference,
    judge,
    parse_accounts,
    parse_completions,
    parse_queue,
    parse_records,
)
from .settings import SlurmSettings

_HERE = Path(__file__).parent
_MAX_IDS = 1000  # in one scancel
_MAX_NAMES = 1000  # in one sacct
_MINUTES_OF_A_DAY = 24 * 60
_NOT_THERE = 66  # of output.sh and look.sh
_NOT_BEGUN, _NOT_KNOWN, _TIMED_OUT = 73, 75, 124  # of submit.sh


class SlurmBackend(CEBackend[SlurmSettings]):
    """The reference of a pilot is its job's number; its stamp is the job's name and comment.

    A stamp is submitted at most once, for a lock and the job's number are kept in the pilot's directory, and
    the queue is searched by name after an unconfirmed submission. A job that Slurm has removed is
    unknown, unless its exit code is in that directory, or its end in the accounts or the completion log.
    """

    Settings = SlurmSettings
    operator_only = True

    def __init__(self, ce: CEDescription, settings: SlurmSettings, shell: Shell | None = None) -> None:
        super().__init__(ce, settings)
        environment = {} if settings.slurm_conf is None else {"SLURM_CONF": str(settings.slurm_conf)}
        if shell is None and settings.ssh is not None:
            shell = SSHShell(settings.ssh, environment)
        self._shell = shell or LocalShell(inherited_environment() | environment)

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
        jobs = await self._queue(pilots)
        over = [pilot for pilot in pilots if not any(job.active for job in jobs.get(pilot.stamp, ()))]
        looked = await self.side_source(self._look(over))
        records, unreadable = parse_records(looked or "")
        for stamp, why in unreadable.items():
            self.warn(f"the directory of {stamp}: {why}")
        forgotten = [
            pilot.stamp
            for pilot in over
            if pilot.stamp not in jobs and not ((record := records.get(pilot.stamp)) and record.exit_code)
        ]
        completions, all_asked = await self._completions(forgotten)
        jobs |= completions
        silent = set(unreadable if looked is not None and all_asked else forgotten) - set(jobs)
        seen = (
            (pilot.stamp, judge(jobs.get(pilot.stamp, ()), records.get(pilot.stamp), reference=pilot.reference))
            for pilot in pilots
        )
        known = {stamp: observation for stamp, observation in seen if observation is not None}
        return dict.fromkeys(silent, Observation(Observed.NO_NEWS)) | known

    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        if not pilots:
            return
        jobs = await self._queue(pilots)
        active = {pilot.stamp: [job for job in jobs.get(pilot.stamp, ()) if not job.ended] for pilot in pilots}
        await self.side_source(self._tidy(("cancelled", stamp) for stamp, own in active.items() if own))
        by_cluster: dict[str, list[str]] = defaultdict(list)
        for job in chain.from_iterable(active.values()):
            by_cluster[job.cluster].append(job.number)
        for cluster, numbers in by_cluster.items():
            waiting = iter(numbers)
            while some := list(islice(waiting, _MAX_IDS)):
                done = await self._run(self._command("scancel", *_of_clusters(cluster), *some))
                if done.returncode != 0 and is_unreachable(done):
                    raise CEUnavailableError(f"scancel: {error_line(done)}")
                if done.stderr.strip() and not has_ended(done):
                    self.warn(f"scancel: {error_line(done)}")

    async def output(self, pilot: PilotAtCE) -> PilotOutput:
        if not self.settings.nodes_see_directory:
            raise OutputUnavailableError(pilot.stamp, f"the nodes of {self.ce.name} have no directory for it")
        texts = []
        for name in ("stdout", "stderr"):
            arguments = [str(self.settings.directory), pilot.stamp, name, str(OUTPUT_LIMIT_BYTES)]
            done = await self._run([*_script("output"), *arguments], what=f"the output of {pilot.stamp}")
            if done.returncode == _NOT_THERE:
                raise OutputUnavailableError(pilot.stamp, "its directory is gone, or never was")
            texts.append(_text_of(done, "output"))
        return PilotOutput(*texts)

    async def cleanup(self, pilots: Sequence[PilotAtCE]) -> None:
        await self._tidy(
            (("ended" if self.settings.keeps(pilot.status) else "remove", pilot.stamp) for pilot in pilots),
            remove_after_minutes=str(round(self.settings.keep_days * _MINUTES_OF_A_DAY)),
        )

    async def close(self) -> None:
        await self._shell.close()

    async def _submit(self, pilot: PilotAtCE) -> SubmitOutcome:
        arguments = [
            str(self.settings.directory),
            pilot.stamp,
            f"{self.settings.timeout_seconds:g}",
            self._path("squeue"),
            self.settings.clusters or "",
            self._path("sbatch"),
            *sbatch_options(self.settings, pilot),
        ]
        job = batch_script(self.settings, self.ce.name, pilot)
        done = await self._run([*_script("submit"), *arguments], job, what="sbatch")
        reference = done.stdout.strip()
        if done.returncode == 0 and is_reference(reference):
            return SubmitOutcome(reference=reference)
        if done.returncode == _TIMED_OUT:
            raise CEUnavailableError(f"sbatch has not answered within {self.settings.timeout_seconds:g} s")
        if done.returncode == _NOT_BEGUN:
            return SubmitOutcome(error=f"the directory of {self.ce.name}: {error_line(done)}")
        refused = submission_error(done) if done.returncode not in (0, _NOT_KNOWN) else None
        if refused is None:
            raise CEUnavailableError(f"sbatch: {error_line(done)}")
        return refused

    async def _queue(self, pilots: Sequence[PilotAtCE]) -> dict[str, list[Job]]:
        """All jobs of this user in these clusters, by name; those in hidden partitions, too."""
        elsewhere = ",".join(sorted({name for pilot in pilots if (name := cluster_of(pilot.reference))}))
        found: dict[str, list[Job]] = defaultdict(list)
        for clusters in [self.settings.clusters] if self.settings.clusters else dict.fromkeys(("", elsewhere)):
            options = ("-h", "--me", "--all", "-t", "all", "-O", QUEUE_FORMAT)
            done = await self._run(self._command("squeue", *_of_clusters(clusters), *options))
            text = _text_of(done, "squeue")
            if clusters and done.stderr.strip():  # of a cluster that does not answer, it says that it has no jobs
                raise CEUnavailableError(f"squeue: {error_line(done)}")
            for stamp, jobs in parse_queue(text, clusters=bool(clusters)).items():
                found[stamp] += jobs
        return found

    async def _look(self, pilots: Sequence[PilotAtCE]) -> str:
        """Read the directories of these pilots; nothing where none of them can have one."""
        if not pilots or not self.settings.nodes_see_directory:
            return ""
        what = f"the directory of {self.ce.name}"
        argv = [*_script("look"), str(self.settings.directory)]
        done = await self._run(argv, _lines(pilot.stamp for pilot in pilots), what=what)
        if done.returncode == _NOT_THERE and not any(pilot.reference for pilot in pilots):
            return ""
        return _text_of(done, what)

    async def _completions(self, stamps: Sequence[str]) -> tuple[dict[str, list[Job]], bool]:
        """Jobs that have ended and that Slurm has forgotten, by name, as its log and its accounts know them.

        And whether all of these could be asked.
        """
        if not stamps:
            return {}, True
        sources = [self._accounts(stamps[at : at + _MAX_NAMES]) for at in range(0, len(stamps), _MAX_NAMES)]
        answers = [await self.side_source(source) for source in (*sources, self._completion_log(stamps))]
        found = {stamp: jobs for answer in answers if answer is not None for stamp, jobs in answer.items()}
        wanted = set(stamps)
        return {stamp: jobs for stamp, jobs in found.items() if stamp in wanted}, None not in answers

    async def _completion_log(self, stamps: Sequence[str]) -> dict[str, list[Job]]:
        if (log := self.settings.completion_log) is None:
            return {}
        done = await self._run(["grep", "-a", "-F", "-f", "-", "--", str(log)], _lines(stamps))
        return parse_completions(done.stdout if done.returncode == 1 else _text_of(done, "grep"))

    async def _accounts(self, stamps: Sequence[str]) -> dict[str, list[Job]]:
        if not self.settings.accounting:
            return {}
        names = f"--name={','.join(stamps)}"
        since = ("--starttime=now-30days", "--endtime=now")  # else it looks at this day alone
        listed = ("--allocations", "--noheader", "--parsable2", f"--format={ACCOUNT_FORMAT}")
        clusters = _of_clusters(self.settings.clusters)
        done = await self._run(self._command("sacct", *clusters, *listed, *since, names))
        return parse_accounts(_text_of(done, "sacct"))

    async def _tidy(self, lines: Iterable[tuple[str, str]], *, remove_after_minutes: str = "") -> None:
        text = "".join(f"{what} {stamp}\n" for what, stamp in lines)
        if text:
            what = f"the directory of {self.ce.name}"
            argv = [*_script("tidy"), str(self.settings.directory), remove_after_minutes]
            _text_of(await self._run(argv, text.encode(), what=what), what)

    async def _run(self, argv: Sequence[str], stdin: bytes = b"", *, what: str | None = None) -> Completed:
        try:
            return await self._shell.run(argv, stdin=stdin, timeout=self.settings.timeout_seconds)
        except CEUnavailableError as error:
            # Name the action in place of the shell that runs our script.
            raise CEUnavailableError(str(error).replace(argv[0], what or argv[0], 1)) from error

    def _command(self, name: str, *arguments: str) -> list[str]:
        return [self._path(name), *arguments]

    def _path(self, name: str) -> str:
        return name if self.settings.commands is None else str(self.settings.commands / name)


def _script(name: str) -> list[str]:
    """The beginning of a command that runs one of our scripts, wherever that is."""
    return ["/bin/sh", "-c", _HERE.joinpath(f"{name}.sh").read_text(), name]


def _of_clusters(clusters: str | None) -> list[str]:
    return [f"--clusters={clusters}"] if clusters else []


def _lines(stamps: Iterable[str]) -> bytes:
    return "".join(f"{stamp}\n" for stamp in stamps).encode()


def _text_of(done: Completed, what: str) -> str:
    """The output of a command that has to succeed.

    Raises:
        CEUnavailableError: it has not.
    """
    if done.returncode != 0:
        raise CEUnavailableError(f"{what}: {error_line(done)} (exit code {done.returncode})")
    return done.stdout
