"""Jobs of Slurm: parsers of queue, records and accounting, and the resulting states of pilots."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from gubbins.ces.protocol import Observation, Observed
from gubbins.domain.text import one_line

QUEUE_FORMAT = "JobID:|,State:|,exit_code:|,Reason:|,Name:|,Cluster:|"
"""Format of `squeue -O`: text, since the JSON output differs between versions of Slurm."""

ACCOUNT_FORMAT = "JobID,State,ExitCode,JobName"
"""Format of `sacct`."""

_REQUEUED = {"REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_WAITING = {"CONFIGURING", "PENDING", *_REQUEUED}
_RUNNING = {"COMPLETING", "RESIZING", "RUNNING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"}
_FAILURES = {
    "BOOT_FAIL": "its node could not be started",
    "CANCELLED": "cancelled at the site",
    "DEADLINE": "it could not end before its deadline",
    "FAILED": "it failed",
    "LAUNCH_FAILED": "it could not be launched",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "it used more memory than it may",
    "PREEMPTED": "it had to make way for other jobs",
    "RECONFIG_FAIL": "its node could not be configured",
    "TIMEOUT": "it ran longer than it may",
}
_ELSEWHERE = "REVOKED"  # a job of a federation that runs in another cluster
# Reasons that give no information.
_PLAIN_REASONS = {"", "(null)", "NodeDown", "NonZeroExitCode", "None", "Priority", "Resources", "TimeLimit"}
_NUMBER = re.compile(r"[0-9]{1,18}")
_REFERENCE = re.compile(r"[0-9]{1,18}(;([A-Za-z0-9_.-]{1,64}))?")


class Job(NamedTuple):
    """A batch job."""

    number: str
    state: str
    exit_code: str  # `code`, or `code:signal`
    reason: str
    cluster: str = ""  # empty: the default cluster

    @property
    def ended(self) -> bool:
        return self.state == "COMPLETED" or self.state in _FAILURES

    @property
    def reference(self) -> str:
        """Job number, with the cluster unless it is the default one."""
        return f"{self.number};{self.cluster}" if self.cluster else self.number

    @property
    def active(self) -> bool:
        """True if the job is in this cluster and has not ended."""
        return not self.ended and self.state != _ELSEWHERE


Jobs = dict[str, list[Job]]
"""Jobs by the stamp of their pilot."""


class Record(NamedTuple):
    """Record of a job in the directory of its pilot."""

    number: str
    exit_code: str  # empty: none yet
    cancelled: bool  # by us
    last_line: str


_NO_RECORD = Record("", "", False, "")


def is_job_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


def is_reference(text: str) -> bool:
    """True if the text is `number`, or `number;cluster`."""
    return _REFERENCE.fullmatch(text) is not None


def cluster_of(reference: str | None) -> str | None:
    """Get the cluster of a reference `number;cluster`; None: it has none."""
    found = _REFERENCE.fullmatch(reference or "")
    return found[2] if found else None


def parse_queue(text: str, *, clusters: bool = False) -> Jobs:
    """Parse the output of `squeue -O QUEUE_FORMAT` to jobs by name; with `clusters`, including their clusters."""
    jobs: Jobs = defaultdict(list)
    for line in text.split("\n"):
        fields = [field.strip() for field in line.split("|")]
        if len(fields) >= 7 and is_job_number(fields[0]):
            number, state, status, *reasons, name, cluster, _ = fields
            reason = "|".join(reasons)
            if state in _WAITING and reason not in _PLAIN_REASONS:
                reason = f"Slurm: {reason}"
            jobs[name].append(Job(number, state, _exit_code(status), reason, cluster if clusters else ""))
    return jobs


def _exit_code(status: str) -> str:
    """The exit code with the signal, of the status of `wait` that squeue prints."""
    return f"{int(status) >> 8}:{int(status) & 127}" if is_job_number(status) else status


def parse_records(text: str) -> tuple[dict[str, Record], dict[str, str]]:
    """Parse the output of `records.sh` to records by stamp, and errors of unreadable directories."""
    records, unreadable = {}, {}
    for line in text.split("\n"):
        fields = line.split("|", 4)
        if len(fields) == 5:
            stamp, number, exit_code, cancelled, message = fields
            records[stamp] = Record(number, exit_code.strip(), bool(cancelled), message.strip())
        elif len(fields) == 3 and fields[1] == "unreadable":
            unreadable[fields[0]] = fields[2]
    return records, unreadable


def parse_completions(text: str) -> Jobs:
    """Parse lines of a log of `jobcomp/filetxt` to ended jobs by name."""
    jobs: Jobs = defaultdict(list)
    for line in text.split("\n"):
        # Directories are chosen by users and may look like fields, so that only the first and last ones are valid.
        before, _, ended = line.rpartition(" ExitCode=")
        fields = {name: value for name, _, value in (word.partition("=") for word in reversed(before.split(" ")))}
        number, name, state = (fields.get(field, "") for field in ("JobId", "Name", "JobState"))
        code, _, signal = ended.partition(":")
        numbers = is_job_number(number) and is_job_number(code)
        job = Job(number, state, ended.strip(), "")
        if line.startswith("JobId=") and numbers and name and signal and job.ended:  # not PENDING, after a requeue
            jobs[name].append(job)
    return jobs


def parse_accounts(text: str) -> Jobs:
    """Parse the output of `sacct --parsable2 --format=ACCOUNT_FORMAT` to ended jobs by name.

    Other states are not reliable: lost jobs may stay RUNNING in the accounting database.
    """
    jobs: Jobs = defaultdict(list)
    for line in text.split("\n"):
        fields = [field.strip() for field in line.split("|")]
        if len(fields) == 4 and is_job_number(fields[0]):
            number, state, code, name = fields
            job = Job(number, state.partition(" ")[0], code, "")  # CANCELLED by 1000
            if job.ended:
                jobs[name].append(job)
    return jobs


def observe_jobs(jobs: Sequence[Job], record: Record | None, *, reference: str | None) -> Observation | None:
    """Derive the state of a pilot; None: it is unknown.

    Args:
        jobs: jobs of its stamp; several are possible after an unconfirmed submission.
        record: record of its directory.
        reference: reference in the database; if None, the observation includes it.
    """
    active = [job for job in jobs if job.active]
    if active:
        job = min(active, key=lambda each: (each.state not in _RUNNING, int(each.number)))
        return _with_reference(_of_active(job), job.reference, reference)
    record = record or _NO_RECORD
    elsewhere, jobs = jobs, [job for job in jobs if job.ended]
    if len(jobs) > 1 and record.exit_code:
        jobs = []  # the exit code is that of the pilot, the others were duplicates
    if jobs:
        job = min(jobs, key=lambda each: int(each.number))
        return _with_reference(_of_ended(job, record), job.reference, reference)
    if record.exit_code:
        return _with_reference(_of_record(record), record.number, reference)
    return Observation(Observed.NO_NEWS, "another cluster has it (REVOKED)") if elsewhere else None


def _with_reference(seen: Observation, number: str, reference: str | None) -> Observation:
    return seen if reference is not None else seen._replace(reference=number if is_reference(number) else None)


def _of_active(job: Job) -> Observation:
    if job.state in _WAITING:
        return Observation(Observed.WAITING, None if job.reason in _PLAIN_REASONS else one_line(job.reason))
    if job.state in _RUNNING:
        return Observation(Observed.RUNNING)
    return Observation(Observed.NO_NEWS, one_line(f"unknown state {job.state}"))


def _of_ended(job: Job, record: Record) -> Observation:
    if job.state == "COMPLETED":
        return Observation(Observed.DONE)
    if job.state == "CANCELLED" and record.cancelled:
        return Observation(Observed.FAILED, "cancelled")
    code, _, signal = (record.exit_code or job.exit_code).partition(":")
    if job.state == "FAILED" and code not in {"", "0"}:
        return _failed(f"exit code {code}", job.reason, record.last_line)
    if job.state == "FAILED" and signal not in {"", "0"}:
        return _failed(f"ended by signal {signal}", job.reason, record.last_line)
    return _failed(f"{_FAILURES[job.state]} ({job.state})", job.reason, record.last_line)


def _of_record(record: Record) -> Observation:
    if record.exit_code == "0":
        return Observation(Observed.DONE)
    if record.cancelled:
        return Observation(Observed.FAILED, "cancelled")
    return _failed(f"exit code {record.exit_code}", "", record.last_line)


def _failed(cause: str, reason: str, last_line: str) -> Observation:
    if reason not in _PLAIN_REASONS:
        cause = f"{cause}, reason {reason}"
    return Observation(Observed.FAILED, one_line(f"{cause}: {last_line}" if last_line else cause))
