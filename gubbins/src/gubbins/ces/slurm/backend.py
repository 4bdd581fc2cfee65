"""Back end `slurm`: sbatch, squeue and scancel, on the host of the worker or through SSH."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from gubbins.ces.protocol import CEDescription, PilotAtCE, SubmitOutcome, batches
from gubbins.ces.transports.shell import Completed, Shell
from gubbins.domain.exceptions import CEUnavailableError

from .batch import batch_script, sbatch_options
from .error_parsing import error_line, has_ended, is_unreachable, submission_error
from .jobs import (
    ACCOUNT_FORMAT,
    QUEUE_FORMAT,
    Job,
    Jobs,
    Record,
    cluster_of,
    parse_accounts,
    parse_completions,
    parse_queue,
)
from .settings import SlurmSettings
from .submit_host import Submission, SubmitHostBackend, jobs_of, lines_of

_MAX_IDS = 1000  # in one scancel
_MAX_NAMES = 1000  # in one sacct
NUMBER = (
    r"s/^\(Submitted batch job [0-9]*\) on cluster /\1;/;"
    r"s/^\(Submitted batch job \)\{0,1\}\([0-9]\{1,18\}\(;[A-Za-z0-9_.-]\{1,64\}\)\{0,1\}\)[[:space:]]*$/\2/p"
)
# Without its header it is not the queue, but the message of a wrapper.
_FIND = """found=$({squeue}) || exit; printf '%s\n' "$found"; case $found in *JOBID*) ;; *) exit 1 ;; esac"""


class SlurmBackend(SubmitHostBackend[SlurmSettings]):
    """Back end of a Slurm site. The stamp of a pilot is the name and comment of its job.

    The accounting database and the completion log are secondary sources for jobs that Slurm has removed.
    """

    Settings = SlurmSettings
    grid_type, queue_setting = "SLURM", "partition"
    # They would hide jobs from `squeue` and `scancel`, or submit several jobs, or wait for their end.
    misleading_variables = "(SQUEUE|SCANCEL)_[A-Z0-9_]+|SBATCH_(ARRAY_INX|WAIT)"

    def __init__(self, ce: CEDescription, settings: SlurmSettings, shell: Shell | None = None) -> None:
        environment = {} if settings.slurm_conf is None else {"SLURM_CONF": str(settings.slurm_conf)}
        super().__init__(ce, settings, shell, environment)
        self.has_directories = settings.nodes_see_directory

    def submission(self, pilot: PilotAtCE) -> Submission:
        options = ["--me", "--all", "-t", "all", *_of_clusters(self.settings.clusters)]
        find = shlex.join(self.command("squeue", *options, "-n", pilot.stamp, "-o", "%i"))
        argv = self.command("sbatch", *sbatch_options(self.settings, pilot))
        script = batch_script(self.settings, self.ce.name, pilot)
        return Submission(argv, script, NUMBER, _FIND.format(squeue=find))

    def refusal(self, done: Completed) -> SubmitOutcome | None:
        return submission_error(done)

    async def cancel_jobs(self, jobs: Iterable[Job]) -> None:
        by_cluster: dict[str, list[str]] = defaultdict(list)
        for job in jobs:
            by_cluster[job.cluster].append(job.number)
        for cluster, numbers in by_cluster.items():
            for batch in batches(numbers, _MAX_IDS):
                done = await self.run_command(self.command("scancel", *_of_clusters(cluster), *batch))
                if done.returncode != 0 and is_unreachable(done):
                    raise CEUnavailableError(f"scancel: {error_line(done)}")
                if done.stderr.strip() and not has_ended(done):
                    self.warn(f"scancel: {error_line(done)}")

    async def queue(self, pilots: Sequence[PilotAtCE]) -> Jobs:
        """As `SubmitHostBackend.queue`, in the clusters of the settings and of references, and all partitions."""
        elsewhere = ",".join(sorted({name for pilot in pilots if (name := cluster_of(pilot.reference))}))
        found: Jobs = defaultdict(list)
        for clusters in [self.settings.clusters] if self.settings.clusters else dict.fromkeys(("", elsewhere)):
            options = ("--me", "--all", "-t", "all", "-O", QUEUE_FORMAT)  # with a header, also without jobs
            done = await self.run_command(self.command("squeue", *_of_clusters(clusters), *options))
            parse = partial(parse_queue, clusters=bool(clusters))
            jobs_by_stamp = jobs_of(done, "squeue", parse, r"^JOBID\b|^\d+ *\|")
            errors = [line for line in done.stderr.splitlines() if line.strip() and "warning" not in line.lower()]
            # The output has no jobs of an unavailable cluster.
            if clusters and errors:
                raise CEUnavailableError(f"squeue: {error_line(done)}")
            for stamp, jobs in jobs_by_stamp.items():
                found[stamp] += jobs
        return found

    async def completions(self, pilots: Sequence[PilotAtCE], records: Mapping[str, Record]) -> tuple[Jobs, bool]:
        """As `SubmitHostBackend.completions`, from the completion log and the accounting database."""
        if not pilots:
            return {}, True
        stamps = [pilot.stamp for pilot in pilots]
        sources = [self._accounts(some) for some in batches(stamps, _MAX_NAMES)]
        responses = [await self.secondary_source(source) for source in (*sources, self._completion_log(stamps))]
        found = {stamp: jobs for response in responses if response is not None for stamp, jobs in response.items()}
        return {stamp: found[stamp] for stamp in stamps if stamp in found}, None not in responses

    async def _completion_log(self, stamps: Sequence[str]) -> Jobs:
        if (log := self.settings.completion_log) is None:
            return {}
        done = await self.run_command(["grep", "-a", "-F", "-f", "-", "--", str(log)], lines_of(stamps))
        return {} if done.returncode == 1 else jobs_of(done, "grep", parse_completions)

    async def _accounts(self, stamps: Sequence[str]) -> Jobs:
        if not self.settings.accounting:
            return {}
        wanted = (f"--name={','.join(stamps)}", "--starttime=now-30days", "--endtime=now")  # the default is today
        listed = ("--allocations", "--noheader", "--parsable2", f"--format={ACCOUNT_FORMAT}")
        clusters = _of_clusters(self.settings.clusters)
        done = await self.run_command(self.command("sacct", *clusters, *listed, *wanted))
        return jobs_of(done, "sacct", parse_accounts)


def _of_clusters(clusters: str | None) -> list[str]:
    return [f"--clusters={clusters}"] if clusters else []
