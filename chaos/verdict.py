"""Was every promise kept? Judged by what the tasks say they did (`witness.py`) and what was done to processes.

What is counted:

- An execution is *disturbed* when its process was killed (by us, or by a task) or paused beyond the lease while
  the worker held the task: from its start to `SETTLE_SECONDS` after its end (the settlement may have been on its
  way). An execution that begins within `AWAKENING_SECONDS` of the end of such a pause is disturbed as well: the
  worker had begun it before and did not know yet what it had lost.
- The *lawful time* of an execution ends with it, or with the death of its process, or where a pause beyond the
  lease begins. What a worker does after such a pause, until its keeper cancels it, nobody can prevent from outside
  the process; it is *late work*, and counted on its own. Its settlement is refused.
- An execution is *interrupted* when it was cancelled and its worker stopped soon after: it starts again.
- *Executed more than once* counts executions beyond the expected number (1; failing ones 3; those that fail once
  2). Each must be explained by a disturbed or interrupted execution of the same task.
- A *violation of mutual exclusion* is a pair of executions whose lawful times overlap although they share a mutex,
  or one writes what the other reads or writes. Executions that began disturbed have no lawful time.
- The *concurrency limit* is broken by each execution that begins while `limit` others are in their lawful time.
- The *rate limit* is broken by each execution beyond `limit` in any window. A grant is given by the server
  a little before the execution begins, so windows are taken `RATE_SLACK_SECONDS` shorter than the limiter's.
"""

from __future__ import annotations

import signal
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from . import tasks
from .drive import Observed
from .plan import Plan
from .witness import Run, Testimony

SETTLE_SECONDS = 1.0
AWAKENING_SECONDS = 1.0
STOP_SECONDS = 5.0
RATE_SLACK_SECONDS = 1.0
#: A process that is younger may still be starting.
START_SECONDS = 8.0
#: Clocks of server and witness differ by less.
_CLOCK_SECONDS = 0.01

_EXPECTED_RUNS = {"Failing": tasks.FAILURES, "Flaky": 2}
_KILLERS = ("Kills", "KillsLocked")
_WITHOUT_LOCKS = ("Quick", "Urgent", "Slow", "Child")


@dataclass(frozen=True, slots=True)
class Promise:
    """One line of the table."""

    name: str
    value: Any
    kept: bool | None = None
    """None: nothing was promised, it is only told."""
    note: str = ""


class Verdict:
    def __init__(self, plan: Plan, observed: Observed, testimony: Testimony, lease: float) -> None:
        self._plan, self._observed, self._lease = plan, observed, lease
        self._runs = [run for run in testimony.runs if run.kind != "Beat"]
        self._beats = [run for run in testimony.runs if run.kind == "Beat"]
        history = observed.history
        self._deaths = {**{pid: at for pid, (at, _) in history.ended.items()}, **history.killed}
        for pid, at in testimony.suicides.items():
            self._deaths[pid] = min(at, self._deaths.get(pid, at))
        self._suicides = testimony.suicides
        self._stops = history.ended
        # From two thirds of a lease on, a pause may cost it: the last renewal was up to a third before.
        self._pauses = {
            pid: [(begin, end) for begin, end in pauses if end - begin > lease * 0.6]
            for pid, pauses in history.pauses.items()
        }
        self._violent = {*history.killed, *testimony.suicides}
        self._by_task: dict[int, list[Run]] = defaultdict(list)
        for run in self._runs:
            self._by_task[run.n].append(run)
        self._arguments = {planned.arguments[0]: planned.arguments for planned in plan.submissions}
        self.details: list[str] = []

    # --- one execution --------------------------------------------------------------------------------------

    def _disturbed_at(self, run: Run) -> float | None:
        """When it was disturbed, if it was."""
        end = float("inf") if run.end is None else run.end + SETTLE_SECONDS
        moments = [begin for begin, over in self._pauses.get(run.pid, ()) if _meets(run, begin, over, end)]
        if run.pid in self._violent and self._deaths[run.pid] <= end:
            moments.append(self._deaths[run.pid])
        return min(moments, default=None)

    def _interrupted(self, run: Run) -> bool:
        """Whether its worker stopped, and its grace period was over before the execution was."""
        ended, code = self._stops.get(run.pid, (0.0, -1))
        return run.how == "CancelledError" and code == 0 and 0 <= ended - (run.end or 0) <= STOP_SECONDS

    def _lawful_end(self, run: Run) -> float:
        end = run.end if run.end is not None else self._deaths.get(run.pid, float("inf"))
        for begin, over in self._pauses.get(run.pid, ()):
            if begin <= run.start <= over + AWAKENING_SECONDS:
                return run.start
            if run.start < begin < end:
                end = begin
        return end

    # --- promises -------------------------------------------------------------------------------------------

    def promises(self) -> list[Promise]:
        rest = self._observed.rested
        return [
            Promise("tasks submitted", len(self._observed.submitted), None, "callbacks of groups included"),
            Promise("executions", len(self._runs)),
            *self._disturbances(),
            Promise(
                "came to rest",
                None if rest is None else round(rest - self._observed.started - self._plan.seconds, 1),
                rest is not None,
                "s after the last disturbance" if rest is not None else f"left: {self._observed.left}",
            ),
            *self._executed(),
            *self._repeated(),
            self._exclusion(),
            self._concurrency(),
            self._rate(),
            *self._groups(),
            self._early(),
            self._schedule(),
            *self._dead_letters(),
            Promise(
                "Redis keys left over",
                len(self._observed.leftover_keys),
                not self._observed.leftover_keys,
                ", ".join(self._observed.leftover_keys[:5]),
            ),
            *self._process_ends(),
            *self._recovery(),
        ]

    def _count(self, name: str, found: list[str], note: str = "") -> Promise:
        """Something of which there must be none."""
        self.details += [f"{name}: {text}" for text in found[:10]]
        return Promise(name, len(found), not found, note)

    def _disturbances(self) -> Iterable[Promise]:
        done = self._observed.done
        yield Promise(
            "disturbances", sum(done.values()), None, ", ".join(f"{k} {v}" for k, v in sorted(done.items()))
        )
        yield Promise("workers killed by a task", len(self._suicides))
        yield Promise("connections cut", self._observed.cut_connections)

    def _executed(self) -> Iterable[Promise]:
        submitted = self._observed.submitted
        never = [f"{kind} {n}" for n, kind in submitted.items() if n not in self._by_task]
        share = 100 * (1 - len(never) / max(1, len(submitted)))
        yield Promise("executed at least once, %", round(share, 3), not never)
        self.details += [f"never executed: {text}" for text in never[:10]]
        unfinished = [
            f"{kind} {n}: {[run.how for run in self._by_task.get(n, ())]}"
            for n, kind in submitted.items()
            if kind not in (*_KILLERS, "Failing") and not any(run.how == "ok" for run in self._by_task.get(n, ()))
        ]
        yield self._count("never finished", unfinished, "but for those that are made to fail or kill")

    def _repeated(self) -> Iterable[Promise]:
        repeated, unexplained = 0, []
        for n, runs in self._by_task.items():
            kind = runs[0].kind
            if kind in _KILLERS:
                continue
            expected = _EXPECTED_RUNS.get(kind, 1)
            repeated += max(0, len(runs) - expected)
            undisturbed = [run for run in runs if self._disturbed_at(run) is None and not self._interrupted(run)]
            if len(undisturbed) > expected or (kind == "Failing" and len(runs) < expected):
                how = ", ".join(f"{r.start:.3f}-{r.end or 0:.3f} {r.pid} {r.how}" for r in runs)
                unexplained.append(f"{kind} {n}: {how}")
        yield Promise(
            "executed more than once", repeated, None, "their worker had died, stopped or was paused with them"
        )
        yield self._count("executed more than once without a reason", unexplained)
        late = [
            run.end - over
            for run in self._runs
            for begin, over in self._pauses.get(run.pid, ())
            if run.end is not None and run.start < begin and run.end > over
        ]
        longest = max(late, default=0.0)
        yield Promise("late work", len(late), None, f"ended at most {longest:.2f} s after its worker awoke")

    def _exclusion(self) -> Promise:
        holds: dict[str, list[tuple[float, float, bool, Run]]] = defaultdict(list)
        for run in self._runs:
            arguments = self._arguments.get(run.n, ())
            if len(arguments) == 2 and run.kind != "Slow" and (end := self._lawful_end(run)) > run.start:
                for key in arguments[1].split("+"):
                    holds[key].append((run.start, end, run.kind == "Reads", run))
        found = []
        for key, intervals in holds.items():
            intervals.sort(key=lambda interval: interval[0])
            open_: list[tuple[float, float, bool, Run]] = []
            for interval in intervals:
                open_ = [other for other in open_ if other[1] > interval[0]]
                found += [
                    f"{key}: {other[3].kind} {other[3].n} and {interval[3].kind} {interval[3].n}, "
                    f"{other[1] - interval[0]:.4f} s"
                    for other in open_
                    if not (other[2] and interval[2])
                ]
                open_.append(interval)
        return self._count("mutual-exclusion violations", found)

    def _concurrency(self) -> Promise:
        open_: list[float] = []
        found, most = [], 0
        for run in (run for run in self._runs if run.kind == "Limited"):
            if (end := self._lawful_end(run)) <= run.start:
                continue
            open_ = [*(other for other in open_ if other > run.start), end]
            most = max(most, len(open_))
            if len(open_) > tasks.CONCURRENCY:
                found.append(f"{run.n} as number {len(open_)}")
        return self._count("concurrency limit broken", found, f"at most {most} of {tasks.CONCURRENCY} at a time")

    def _rate(self) -> Promise:
        starts = [run.start for run in self._runs if run.kind == "Rated" and self._lawful_end(run) > run.start]
        window = tasks.RATE_SECONDS - RATE_SLACK_SECONDS
        first, found, most = 0, [], 0
        for last, start in enumerate(starts):
            while start - starts[first] > window:
                first += 1
            most = max(most, last - first + 1)
            if last - first + 1 > tasks.RATE:
                found.append(f"{last - first + 1} in {window:g} s")
        return self._count("rate limit broken", found, f"at most {most} of {tasks.RATE} in {window:g} s")

    def _groups(self) -> Iterable[Promise]:
        fired, wrong = 0, []
        for callback, children in self._observed.groups.items():
            runs = self._by_task.get(callback, [])
            fired += any(run.kind == "GroupDone" for run in runs)
            if len([run for run in runs if self._disturbed_at(run) is None]) > 1:
                wrong.append(f"{callback} fired more than once")
            if any(run.kind == "GroupFailed" for run in runs):
                wrong.append(f"{callback} fired as failed")
            for child in children:
                done = [run.end for run in self._by_task.get(child, ()) if run.how == "ok" and run.end is not None]
                if runs and (not done or min(done) > runs[0].start):
                    wrong.append(f"{callback} fired before its child {child} had ended")
        groups = len(self._observed.groups)
        share = 100 * fired / groups if groups else 100.0
        yield Promise("callbacks fired, %", round(share, 3), fired == groups, f"{groups} groups")
        yield self._count("callbacks fired twice, early or as failed", wrong)

    def _early(self) -> Promise:
        early = [
            f"{n} by {due - self._by_task[n][0].start:.3f} s"
            for n, due in self._observed.due.items()
            if self._by_task.get(n) and self._by_task[n][0].start < due - _CLOCK_SECONDS
        ]
        return self._count("delayed tasks that began early", early)

    def _schedule(self) -> Promise:
        if not self._beats:
            return Promise("occurrences of the periodic task", 0, False)
        span = self._beats[-1].start - self._beats[0].start
        most = int(span / tasks.BEAT_SECONDS) + 2
        undisturbed = [run for run in self._beats if self._disturbed_at(run) is None]
        return Promise(
            "occurrences of the periodic task",
            len(self._beats),
            len(undisturbed) <= most,
            f"at most {most} were due",
        )

    def _dead_letters(self) -> Iterable[Promise]:
        found = Counter((letter["n"], letter["reason"]) for letter in self._observed.letters)
        expected = {
            (n, "exhausted" if kind == "Failing" else "poison")
            for n, kind in self._observed.submitted.items()
            if kind in (*_KILLERS, "Failing")
        }
        yield Promise("dead letters", len(found), None, f"{len(expected)} expected")
        yield self._count("dead letters missing", [f"{n} {reason}" for n, reason in expected - set(found)])
        others = [
            f"{letter['kind']} {letter['n']} {letter['reason']}: {letter['detail']}"
            for letter in self._observed.letters
            if (letter["n"], letter["reason"]) not in expected
        ]
        yield self._count("dead letters that nobody expected", others)

    def _process_ends(self) -> Iterable[Promise]:
        history = self._observed.history
        crashed = [
            f"{pid} with {code}"
            for pid, (_, code) in history.ended.items()
            if pid not in self._violent
            and code != 0
            and not (code in (1, -signal.SIGTERM) and self._was_young(pid))
        ]
        yield self._count("processes that ended by themselves or stopped badly", crashed)

    def _was_young(self, pid: int) -> bool:
        """Was it cut off or told to stop while it started? Then it gives up, and its supervisor tries again."""
        history = self._observed.history
        at = min(history.stopped.get(pid, float("inf")), history.ended[pid][0])
        return at - history.started[pid] < START_SECONDS

    def _recovery(self) -> Iterable[Promise]:
        waits = []
        for runs in self._by_task.values():
            for run, following in pairwise(runs):
                at = self._disturbed_at(run)
                if run.kind in _WITHOUT_LOCKS and at is not None and run.end is None:
                    waits.append(following.start - at)
        if waits:
            p50, longest = statistics.median(waits), max(waits)
            yield Promise(
                "recovery of a dead worker's tasks, p50 s", round(p50, 2), None, f"lease {self._lease:g} s"
            )
            yield Promise(
                "recovery of a dead worker's tasks, max s", round(longest, 2), None, f"{len(waits)} tasks"
            )


def _meets(run: Run, begin: float, over: float, end: float) -> bool:
    """Does a pause meet the time for which the worker held the task?"""
    return run.start <= over + AWAKENING_SECONDS and begin <= end
