"""Check of all promises, from records of tasks (`records.py`) and injected failures.

What is counted:

- *Lost*: a task whose submission was acknowledged, and which neither succeeded nor became a dead letter. What was
  acknowledged while the configuration may lose what is written (`redis_servers.Outage`) is counted on its own. A
  submission without a reply may have arrived or not; if it has, all other promises hold for it.
- *Executed more than once* counts executions beyond the expected number (1; failing ones 3; those that fail once
  2), by what disturbed the one before (`executions.py`). Beyond what nothing disturbed, none is allowed.
- *Recovery* is judged where only processes are disturbed, and by its median, for a single task may wait behind
  others: a lease and a second, counted while a worker of the task's size was up. Beside a poison task it is
  reported only, for each death costs a lease.
- *Overlaps* of executions that exclude each other are judged by time alone (`exclusion.py`).
- The *concurrency limit* is broken by each execution that begins while `limit` others are active.
- The *rate limit* is broken by each execution beyond `limit` in any window. A grant is given by the server
  a little before the execution begins, so windows are taken `RATE_SLACK_SECONDS` shorter than the limiter's; those
  that began late, by a pause or on a slow link, are left out.
"""

from __future__ import annotations

import signal
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from . import executions as by
from . import tasks
from .drive import MAX_DELIVERIES, Observed
from .exclusion import RESUMED_SECONDS, overlaps
from .executions import START_SECONDS, START_UNSEEN_SECONDS, Executions
from .plan import Plan
from .records import Records, Run
from .recovery import BESIDE_POISON, recovery

RATE_SLACK_SECONDS = 1.0
#: A median of fewer waits says nothing.
_FEW_WAITS = 5
#: Clocks of the server and of the records differ by less.
_CLOCK_SECONDS = 0.01

_EXPECTED_RUNS = {"Failing": tasks.FAILURES, "Flaky": 2}
_KILLERS = ("Kills", "KillsLocked")
_LOCKING = ("Locked", "LockedSmall", "LockedTwice", "LockedLong", "KillsLocked", "Reads", "ReadsLong", "Writes")


@dataclass(frozen=True, slots=True)
class Promise:
    """One line of the table."""

    name: str
    value: Any
    kept: bool | None = None
    """None: not a promise, only reported."""
    note: str = ""


class ChaosResult:
    def __init__(self, plan: Plan, observed: Observed, records: Records, lease: float) -> None:
        self._plan, self._observed, self._lease = plan, observed, lease
        self._executions = Executions(observed, records, lease)
        self._killed_by_task = records.killed_by_task
        self._runs = [run for run in records.runs if run.kind != "Beat"]
        self._beats = [run for run in records.runs if run.kind == "Beat"]
        self._by_task: dict[int, list[Run]] = defaultdict(list)
        for run in self._runs:
            self._by_task[run.n].append(run)
        self._arguments = {planned.arguments[0]: planned.arguments for planned in plan.submissions}
        self._reasons: dict[int, set[str]] = defaultdict(set)
        for row in observed.dead_letters:
            self._reasons[row["n"]].add(row["reason"])
        self.details: list[str] = []

    def promises(self) -> list[Promise]:
        rest, observed = self._observed.rested, self._observed
        return [
            Promise("tasks submitted", len(observed.submitted), None, "callbacks of groups included"),
            Promise("executions", len(self._runs)),
            *self._disturbances(),
            Promise(
                "all tasks ended",
                None if rest is None else round(rest - observed.settled, 1),
                rest is not None,
                "s after the last disturbance" if rest is not None else f"left: {observed.left}",
            ),
            *self._lost(),
            *self._repeated(),
            *self._exclusion(),
            self._concurrency(),
            self._rate(),
            *self._groups(),
            self._early(),
            self._schedule(),
            *self._dead_letters(),
            Promise(
                "Redis keys left over",
                len(observed.leftover_keys),
                not observed.leftover_keys,
                ", ".join(observed.leftover_keys[:5]),
            ),
            *self._process_ends(),
            *self._recovery(),
        ]

    def _count(self, name: str, found: list[str], note: str = "") -> Promise:
        """Promise that no event of a kind occurs."""
        self.details += [f"{name}: {text}" for text in found[:10]]
        return Promise(name, len(found), not found, note)

    def _disturbances(self) -> Iterable[Promise]:
        done = self._observed.done
        yield Promise(
            "disturbances", sum(done.values()), None, ", ".join(f"{k} {v}" for k, v in sorted(done.items()) if v)
        )
        yield Promise("workers killed by poison tasks", len(self._killed_by_task))
        lengths = [outage.end - outage.begin for outage in self._observed.outages]
        yield Promise("server unavailable, s", round(sum(lengths), 1), None, f"{len(lengths)} outages")

    # --- lost, and executed twice ---------------------------------------------------------------------------

    def _finished(self, n: int) -> bool:
        return bool(self._reasons[n]) or any(run.how == "ok" for run in self._by_task.get(n, ()))

    def _lost(self) -> Iterable[Promise]:
        acknowledged = self._observed.acknowledged
        without_reply = [n for n in self._observed.submitted if n not in acknowledged]
        arrived = sum(n in self._by_task for n in without_reply)
        yield Promise("submissions without a reply", len(without_reply), None, f"{arrived} of them had arrived")
        lost, ages = [], []
        for n, at in acknowledged.items():
            if self._finished(n):
                continue
            before = [o for o in self._observed.outages if o.lost_from <= at <= o.lost_until]
            if before:
                ages.append(at - before[0].begin)
            else:
                how = [run.how or "died" for run in self._by_task.get(n, ())]
                lost.append(f"{self._observed.submitted[n]} {n}, executions: {how or 'none'}")
        yield self._count("acknowledged tasks lost", lost)
        yield Promise("acknowledged tasks lost with the server's data", len(ages))
        if ages:
            since = "s since the server was disturbed"
            yield Promise("— the first was acknowledged", round(min(ages), 2), None, since)
            yield Promise("— the last was acknowledged", round(max(ages), 2), None, since)

    def _repeated(self) -> Iterable[Promise]:
        reasons: Counter[str] = Counter()
        unexplained, twice = [], []
        for n, runs in self._by_task.items():
            kind = runs[0].kind
            if kind in _KILLERS:
                continue
            expected = _EXPECTED_RUNS.get(kind, 1)
            disturbed = [self._executions.first_disturbance(run) for run in runs]
            how = ", ".join(f"{r.start:.3f}-{r.end or 0:.3f} {r.pid} {r.how}" for r in runs)
            gave_up_early = "exhausted" in self._reasons[n] and len(runs) < _EXPECTED_RUNS.get(kind, 0)
            if disturbed.count(None) > expected or gave_up_early:
                unexplained.append(f"{kind} {n}: {how}")
            again = [each[1] for each in disturbed[:-1] if each is not None]
            reasons.update(again[: max(0, len(runs) - expected)])
            if kind == "Once" and any(
                by.DATA_LOST not in {reason for _, reason in self._executions.disturbances(run)}
                for run, _ in pairwise(runs)
            ):
                twice.append(f"{n}: {how}")
        yield Promise("executed more than once", reasons.total())
        for reason in by.REASONS:
            yield Promise(f"— {reason}", reasons[reason])
        yield self._count("executed more than once without a reason", unexplained)
        yield self._count("at-most-once tasks executed more than once", twice)

    # --- locks and limits -----------------------------------------------------------------------------------

    def _exclusion(self) -> Iterable[Promise]:
        holds = [
            (run, self._arguments[run.n][1].split("+"))
            for run in self._runs
            if run.kind in _LOCKING and run.n in self._arguments
        ]
        found = overlaps(self._executions, holds, self._lease)
        yield self._count("overlaps of mutually exclusive executions", found.proper)
        longest = max(found.resumed, default=0.0)
        yield Promise(
            "— after a paused process was resumed (SIGCONT)",
            len(found.resumed),
            longest <= RESUMED_SECONDS,
            f"at most {longest * 1000:.0f} ms of {RESUMED_SECONDS * 1000:.0f}",
        )
        longest = max(found.data_lost, default=0.0)
        yield Promise(
            "— after the server lost the lock",
            len(found.data_lost),
            None,
            f"at most {longest:.2f} s" if longest else "",
        )

    def _concurrency(self) -> Promise:
        open_: list[float] = []
        found, most = [], 0
        spans = [
            (start, end, run.n)
            for run in self._runs
            if run.kind == "Limited"
            for start, end, late in self._executions.active(run)
            if not late
        ]
        for start, end, n in sorted(spans):
            open_ = [*(other for other in open_ if other > start), end]
            if self._executions.may_be_forgotten(start, start, self._lease):
                continue
            most = max(most, len(open_))
            if len(open_) > tasks.CONCURRENCY:
                found.append(f"{n} as number {len(open_)}")
        return self._count("concurrency limit exceeded", found, f"at most {most} of {tasks.CONCURRENCY} at a time")

    def _rate(self) -> Promise:
        rated = [run for run in self._runs if run.kind == "Rated"]
        starts = [run.start for run in rated if not self._executions.was_late(run)]
        window = tasks.RATE_SECONDS - RATE_SLACK_SECONDS
        first, found, most = 0, [], 0
        for last, start in enumerate(starts):
            while start - starts[first] > window:
                first += 1
            if self._executions.may_be_forgotten(starts[first], start, tasks.RATE_SECONDS):
                continue
            most = max(most, last - first + 1)
            if last - first + 1 > tasks.RATE:
                found.append(f"{last - first + 1} in {window:g} s")
        return self._count("rate limit exceeded", found, f"at most {most} of {tasks.RATE} in {window:g} s")

    # --- groups, times, dead letters ------------------------------------------------------------------------

    def _groups(self) -> Iterable[Promise]:
        fired, wrong = 0, []
        for callback, children in self._observed.groups.items():
            runs = self._by_task.get(callback, [])
            fired += bool(runs)
            if len([run for run in runs if self._executions.first_disturbance(run) is None]) > 1:
                wrong.append(f"{callback} fired more than once")
            if any(run.kind == "GroupFailed" for run in runs):
                wrong.append(f"{callback} fired as failed")
            for child in children:
                done = [run.end for run in self._by_task.get(child, ()) if run.how == "ok" and run.end is not None]
                if runs and (not done or min(done) > runs[0].start):
                    wrong.append(f"{callback} fired before its child {child} had ended")
            begun = sum(child in self._by_task for child in children)
            if callback not in self._observed.acknowledged and begun > 0 and not runs and not self._data_lost():
                wrong.append(f"{callback} never fired, though {begun} of its children had arrived without a reply")
        yield Promise("callbacks fired", fired, None, f"of {len(self._observed.groups)} groups")
        yield self._count("callbacks fired repeatedly, early or as failed, or missing", wrong)

    def _data_lost(self) -> int:
        """Count how often data may have been lost."""
        return sum(outage.lost_from <= outage.lost_until for outage in self._observed.outages)

    def _early(self) -> Promise:
        early = [
            f"{n} by {due - self._by_task[n][0].start:.3f} s"
            for n, due in self._observed.due.items()
            if self._by_task.get(n) and self._by_task[n][0].start < due - _CLOCK_SECONDS
        ]
        return self._count("delayed tasks started early", early)

    def _schedule(self) -> Promise:
        if not self._beats:
            return Promise("occurrences of the periodic task", 0, False)
        span = self._beats[-1].start - self._beats[0].start
        most = int(span / tasks.BEAT_SECONDS) + 2 + self._data_lost()
        undisturbed = [run for run in self._beats if self._executions.first_disturbance(run) is None]
        return Promise(
            "occurrences of the periodic task",
            len(self._beats),
            len(undisturbed) <= most,
            f"at most {most} were due",
        )

    def _dead_letters(self) -> Iterable[Promise]:
        """Check the dead letters of tasks that were begun; a task that never began and has none is lost."""
        expected = {
            (n, "exhausted" if kind == "Failing" else "poison")
            for n, kind in self._observed.submitted.items()
            if kind in (*_KILLERS, "Failing")
        }
        found = {(n, reason) for n, reasons in self._reasons.items() for reason in reasons}
        missing = [
            f"{n} {reason}"
            for n, reason in expected - found
            if n in self._by_task and not self._acknowledged_in_vain(n)
        ]
        yield Promise("dead letters", len(found), None, f"{len(expected)} expected")
        yield self._count("dead letters missing", missing)
        others = [
            f"{row['kind']} {row['n']} {row['reason']}: {row['detail']}"
            for row in self._observed.dead_letters
            if (row["n"], row["reason"]) not in expected and not self._was_due(row)
        ]
        yield self._count("unexpected dead letters", others)

    def _acknowledged_in_vain(self, n: int) -> bool:
        at = self._observed.acknowledged.get(n)
        return any(
            at is None or outage.lost_from <= at <= outage.lost_until
            for outage in self._observed.outages
            if outage.lost_from <= outage.lost_until
        )

    def _was_due(self, row: dict[str, Any]) -> bool:
        """Was it interrupted, whenever it had begun, by a disturbance? It may not have begun each time."""
        runs = self._by_task.get(row["n"], ())
        causes = [found and found[1] for found in map(self._executions.first_disturbance, runs)]
        if row["reason"] == "poison":  # it was unlucky: so many of its workers were killed
            ends = {by.KILLED, by.BESIDE_POISON}
            lost = [any(cause in ends for _, cause in self._executions.disturbances(run)) for run in runs]
            return sum(lost) >= MAX_DELIVERIES or (bool(lost) and all(lost))
        interrupted = row["reason"] == "interrupted" or (row["kind"], row["reason"]) == ("Once", "exhausted")
        return interrupted and None not in causes

    def _process_ends(self) -> Iterable[Promise]:
        crashed = [
            f"{self._observed.history.names.get(pid, '')} {pid} with {code}"
            for pid, (_, code) in self._observed.history.ended.items()
            if pid not in self._executions.violent
            and code != 0
            and not (code in (1, -signal.SIGTERM) and self._was_young(pid))
        ]
        yield self._count("processes that crashed or failed to stop", crashed)

    def _was_young(self, pid: int) -> bool:
        """True if it was disconnected or stopped during its start, so that it exits and its supervisor retries."""
        history = self._observed.history
        started = history.started[pid]
        at = min(history.stopped.get(pid, float("inf")), history.ended[pid][0])
        outages = [(outage.begin, outage.over) for outage in self._observed.outages]
        outages += self._executions.disconnected(pid)
        meanwhile = sum(max(0.0, min(over, at) - max(begin, started)) for begin, over in outages)
        seen = any(run.pid == pid for run in self._runs)
        return at - started < (START_SECONDS if seen else START_UNSEEN_SECONDS) + meanwhile

    def _recovery(self) -> Iterable[Promise]:
        found = recovery(self._executions, self._observed, self._by_task.values(), self._runs)
        of_others = ("link", "server", "database", "power")
        alone = not any(other in each.what for each in self._plan.disturbances for other in of_others)
        for case, waits in found.items():
            yield Promise(
                f"recovery, {case}: p50 / p99 / max s",
                waits,
                waits.p50_up <= self._lease + 1.0
                if alone and case != BESIDE_POISON and waits.number >= _FEW_WAITS
                else None,
                f"{waits.number} times; p50 {waits.p50_up:g} s while a worker was up; lease {self._lease:g} s",
            )


def as_json(value: Any) -> Any:
    """A value of a promise, for a JSON document."""
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
