"""Jobs of a schedd: parse the queue and the history, and derive the state of a pilot."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from gubbins.ces.protocol import Observation, Observed, PilotAtCE
from gubbins.domain.text import one_line

_KINDS: dict[str, type] = {
    "GubbinsStamp": str, "ClusterId": int, "ProcId": int, "GubbinsCarrier": int, "JobStatus": int,
    "ExitBySignal": bool, "ExitCode": int, "ExitSignal": int, "HoldReason": str, "HoldReasonCode": int,
    "LastHoldReason": str, "LastHoldReasonCode": int, "RemoveReason": str, "EnteredCurrentStatus": int,
    "ServerTime": int, "RemoteHost": str,
}  # fmt: skip
ATTRIBUTES = tuple(_KINDS)
"""Attributes of a job, in the order of a row."""

ABANDONED = "its files have never come to the schedd"
"""Reason of the removal of jobs whose files were never spooled."""

_REMOVED, COMPLETED, _HELD = 3, 4, 5
_SPOOLING = 16


class Job(NamedTuple):
    """A job, with its attributes in the order of a row; None: an attribute that is missing or invalid."""

    stamp: str | None
    cluster: int
    proc: int
    carrier: int | None
    status: int | None
    by_signal: bool | None
    exit_code: int | None
    exit_signal: int | None
    hold_reason: str | None
    hold_code: int | None
    last_hold_reason: str | None
    last_hold_code: int | None
    remove_reason: str | None
    entered: int | None  # time since which it is in this state
    seen: int | None  # time of the schedd
    remote_host: str | None  # its node, also during its removal

    @property
    def reference(self) -> str:
        """Job id, as in the commands of HTCondor."""
        return f"{self.cluster}.{self.proc}"

    @property
    def ended(self) -> bool:
        """True if the job has ended; a removed job may still be running."""
        return self.status == COMPLETED or (self.status == _REMOVED and self.remote_host is None)

    def lasts(self, seconds: float) -> bool:
        """True if it has been in this state for longer than this."""
        return self.entered is not None and self.seen is not None and self.seen - self.entered > seconds

    def abandoned(self, spool_seconds: float) -> bool:
        """True if the files of the job were not spooled within this time: it would wait forever."""
        return self.status == _HELD and self.hold_code == _SPOOLING and self.lasts(spool_seconds)


def parse_jobs(rows: object) -> list[Job]:
    """Parse rows to jobs, sorted by id; rows without a job are skipped."""
    valid = [row for row in rows if isinstance(row, list)] if isinstance(rows, list) else []
    jobs = [Job(*map(_parse, row, _KINDS.values())) for row in valid if len(row) == len(_KINDS)]
    known = [job for job in jobs if job.cluster is not None and job.proc is not None]
    return sorted(known, key=lambda job: (job.cluster, job.proc))


def _parse(value: object, kind: type) -> Any:
    return value if type(value) is kind and str(value).strip() else None


def by_stamp(jobs: Iterable[Job]) -> dict[str, list[Job]]:
    """Group jobs by their stamps, without those that have none."""
    found: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        if job.stamp is not None:
            found[job.stamp].append(job)
    return dict(found)


def unused_carriers(jobs: Collection[Job], seconds: float) -> list[Job]:
    """Find carriers that have had no pilot in the queue for longer than this."""
    used = {job.carrier for job in jobs if job.carrier != job.cluster}
    return [job for job in jobs if job.carrier == job.cluster and job.carrier not in used and job.lasts(seconds)]


def pilots_own(pilot: PilotAtCE, jobs: Sequence[Job]) -> Job | None:
    """Choose the job of a pilot; an unconfirmed submission may have left two of one stamp."""
    named = [job for job in jobs if job.reference == pilot.reference]
    return next(iter(named or jobs), None)


def judge(pilot: PilotAtCE, job: Job) -> Observation:
    """Derive the state of a pilot from its job."""
    state, reason = _judge(pilot, job)
    reference = job.reference if pilot.reference is None else None
    return Observation(state, one_line(reason) if reason else None, reference)


def _judge(pilot: PilotAtCE, job: Job) -> tuple[Observed, str | None]:
    seen: tuple[Observed, str | None]
    match job.status:
        case 1:
            seen = Observed.WAITING, None
        case 3 if job.ended:
            seen = Observed.FAILED, "cancelled" if pilot.cancel_requested else _why_removed(job)
        case 2 | 3 | 6 | 7:  # 6: ended, transferring its output
            seen = Observed.RUNNING, None
        case 4:
            seen = _of_completed(job)
        case 5 if job.hold_code == _SPOOLING:
            seen = Observed.WAITING, None
        case 5:
            seen = Observed.WAITING, f"on hold (code {_known(job.hold_code)}): {_known(job.hold_reason)}"
        case _:
            seen = Observed.NO_NEWS, f"HTCondor: unknown state {job.status}"
    return seen


def _of_completed(job: Job) -> tuple[Observed, str | None]:
    if job.by_signal:
        return Observed.FAILED, f"ended by signal {_known(job.exit_signal)}"
    if job.exit_code != 0:
        return Observed.FAILED, f"exit code {_known(job.exit_code)}"
    return Observed.DONE, None


def _why_removed(job: Job) -> str:
    """Reason of HTCondor; for a removal by our own rule, the reason of the hold."""
    reason = job.remove_reason or ""
    if reason.startswith(ABANDONED):
        return ABANDONED
    if not re.search(r"\bPeriodicRemove\b", reason):
        return f"removed at the site: {reason or 'no reason is given'}"
    code = job.hold_code if job.hold_code is not None else job.last_hold_code
    words = job.hold_reason or job.last_hold_reason
    if code is None or code == _SPOOLING or words is None:
        return "interrupted on its node; it is not started a second time"
    return f"put on hold (code {code}): {words}"


def _known(value: object) -> Any:
    return "unknown" if value is None else value
