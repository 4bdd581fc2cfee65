"""Jobs of a schedd: parse the queue and the history, and derive the state of a pilot."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gubbins.ces.protocol import Observation, Observed, PilotAtCE
from gubbins.domain.text import one_line

ATTRIBUTES = (
    "GubbinsStamp", "ClusterId", "ProcId", "JobStatus", "ExitBySignal", "ExitCode", "ExitSignal",
    "HoldReason", "HoldReasonCode", "LastHoldReason", "LastHoldReasonCode", "RemoveReason",
    "EnteredCurrentStatus", "ServerTime", "RemoteHost", "GubbinsCarrier",
)  # fmt: skip
"""Attributes of a job, in the order of a row."""

ABANDONED = "its files have never come to the schedd"
"""Reason of the removal of jobs whose files were never spooled."""

_REMOVED, _COMPLETED, _HELD = 3, 4, 5
_SPOOLING = 16


class Job(NamedTuple):
    """A job; None: an attribute that is missing or invalid."""

    cluster: int
    proc: int
    status: int | None
    by_signal: bool
    exit_code: int | None
    exit_signal: int | None
    hold_reason: str | None
    hold_code: int | None
    last_hold_reason: str | None
    last_hold_code: int | None
    remove_reason: str | None
    seconds: int | None  # since it is in this state
    remote_host: str | None  # its node, also during its removal

    @property
    def reference(self) -> str:
        """Job id, as in the commands of HTCondor."""
        return f"{self.cluster}.{self.proc}"

    @property
    def ended(self) -> bool:
        """True if the job has ended; a removed job may still be running."""
        return self.status == _COMPLETED or (self.status == _REMOVED and self.remote_host is None)

    def abandoned(self, spool_seconds: float) -> bool:
        """True if the files of the job were not spooled within this time: it would wait forever."""
        return self.status == _HELD and self.hold_code == _SPOOLING and (self.seconds or 0) > spool_seconds

    @property
    def completed(self) -> bool:
        """True if the job has completed: its output is available."""
        return self.status == _COMPLETED


def parse_jobs(rows: object) -> dict[str, list[Job]]:
    """Parse rows to jobs by stamp, sorted by id; rows without a job are skipped."""
    jobs: dict[str, list[Job]] = defaultdict(list)
    for row in _rows(rows):
        numbers = {name: _number(value) for name, value in row.items()}
        texts = {name: _text(value) for name, value in row.items()}
        stamp, cluster, proc = texts["GubbinsStamp"], numbers["ClusterId"], numbers["ProcId"]
        if stamp is None or cluster is None or proc is None:
            continue
        since, now = numbers["EnteredCurrentStatus"], numbers["ServerTime"]
        jobs[stamp].append(
            Job(
                cluster,
                proc,
                status=numbers["JobStatus"],
                by_signal=row["ExitBySignal"] is True,
                exit_code=numbers["ExitCode"],
                exit_signal=numbers["ExitSignal"],
                hold_reason=texts["HoldReason"],
                hold_code=numbers["HoldReasonCode"],
                last_hold_reason=texts["LastHoldReason"],
                last_hold_code=numbers["LastHoldReasonCode"],
                remove_reason=texts["RemoveReason"],
                seconds=None if since is None or now is None else now - since,
                remote_host=texts["RemoteHost"],
            )
        )
    return {stamp: sorted(each, key=lambda job: (job.cluster, job.proc)) for stamp, each in jobs.items()}


def unused_carriers(rows: object, seconds: float) -> list[str]:
    """Find carriers that have had no pilot in the queue for longer than this."""
    names = ("GubbinsCarrier", "ClusterId", "EnteredCurrentStatus", "ServerTime")
    carried = [[_number(row[name]) for name in names] for row in _rows(rows)]
    used = {carrier for carrier, cluster, *_ in carried if carrier != cluster}
    return [
        f"{cluster}.0"
        for carrier, cluster, since, now in carried
        if carrier == cluster and carrier not in used and since is not None and (now or 0) - since > seconds
    ]


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
        case 2 | 6 | 7:  # 6: ended, transferring its output
            seen = Observed.RUNNING, None
        case 3 if not job.ended:
            seen = Observed.RUNNING, None
        case 3:
            seen = Observed.FAILED, "cancelled" if pilot.cancel_requested else _why_removed(job)
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


def _rows(rows: object) -> Iterator[dict[str, Any]]:
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, list) and len(row) == len(ATTRIBUTES):
            yield dict(zip(ATTRIBUTES, row, strict=True))


def _known(value: object) -> Any:
    return "unknown" if value is None else value


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value.strip() else None
