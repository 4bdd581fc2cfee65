"""Conversion of measurements to tables, targets and the section of RESULTS.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ..results import machine
from . import scenarios
from .catalogue import PEERS, Peer


@dataclass(frozen=True)
class Problem:
    """Reason for a missing figure."""

    peer: str
    scenario: str
    round: int
    reason: str
    skipped: bool = False
    """True: this peer does not support the scenario."""


@dataclass
class Measurements:
    """All figures of all rounds."""

    peers: list[Peer]
    rounds: int
    values: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """(peer, figure) -> one value per round."""
    problems: list[Problem] = field(default_factory=list)
    seconds: float = 0.0
    load: float = 0.0
    """Load average of the machine before the run."""

    def add(self, peer: str, figures: dict[str, float]) -> None:
        for figure, value in figures.items():
            self.values.setdefault((peer, figure), []).append(value)

    def median(self, peer: str, figure: str) -> float | None:
        values = self.values.get((peer, figure))
        return None if not values else statistics.median(values)

    def of_others(self, figure: str) -> dict[str, float]:
        """The medians of the peers, without ours and the bare loops."""
        found = {}
        for peer in self.peers:
            value = self.median(peer.name, figure)
            if value is not None and not peer.is_bare and not peer.is_ours:
                found[peer.name] = value
        return found


# --- tables ---------------------------------------------------------------------------------------------------


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _bytes(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


@dataclass(frozen=True)
class Column:
    """A column of a table: one figure, or several with a slash between them."""

    title: str
    scenario: str
    figures: tuple[str, ...]
    show: Callable[[float], str] = _whole


_TABLES: tuple[tuple[str, tuple[Column, ...]], ...] = (
    (
        "Tasks per second (more is better)",
        (
            Column("drain", "drain", ("drain",)),
            Column("drain, a mutex each", "mutex", ("mutex",)),
            Column("drain, results stored", "results", ("results",)),
            Column(f"drain, {scenarios.WORKERS} workers", "workers", ("workers",)),
            Column("10,000 / 1,000,000 waiting", "backlog", ("backlog_short", "backlog")),
            Column("submit one by one", "enqueue", ("one_by_one",)),
            Column("submit in bulk", "enqueue", ("bulk",)),
        ),
    ),
    (
        "Time (less is better)",
        (
            Column("latency p50 / p99, ms", "latency", ("latency_p50", "latency_p99"), _short),
            Column("delayed: late p50 / p99, ms", "delayed", ("late_p50", "late_p99"), _short),
            Column("delayed: early by up to, ms", "delayed", ("early",), _short),
            Column("1,000 sleeps of 10 ms, s", "sleep", ("sleep",), _short),
            Column(f"{scenarios.BEHIND_ONE_MUTEX} tasks behind one mutex, s", "one-mutex", ("one_mutex",), _short),
            Column("start to first task, s", "startup", ("start",), _short),
        ),
    ),
    (
        "Resources (less is better)",
        (
            Column("Redis bytes per queued task", "memory", ("queued_bytes",), _bytes),
            Column("left over per done task / in all, kB", "memory", ("left_bytes", "left_fixed"), _bytes),
            Column("RSS of a worker, MB", "startup", ("rss",)),
            Column("idle worker, % of a core", "idle", ("idle_processor",), _short),
            Column("idle worker, requests / commands per s", "idle", ("idle_requests", "idle_commands"), _short),
        ),
    ),
)


def _cell(taken: Measurements, peer: Peer, column: Column) -> str:
    values = [taken.median(peer.name, figure) for figure in column.figures]
    if all(value is None for value in values):
        mine = [p for p in taken.problems if (p.peer, p.scenario) == (peer.name, column.scenario)]
        return "**failed**" if any(not problem.skipped for problem in mine) else "-"
    return " / ".join("-" if value is None else column.show(value) for value in values)


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(taken: Measurements) -> str:
    parts = []
    for title, columns in _TABLES:
        used = [
            column
            for column in columns
            if any((p.name, f) in taken.values for p in taken.peers for f in column.figures)
        ]
        if not used:
            continue
        rows = []
        for peer in taken.peers:
            cells = [_cell(taken, peer, column) for column in used]
            if set(cells) != {"-"}:
                rows.append([f"**{peer.title}**" if peer.is_ours else peer.title, *cells])
        parts.append(f"### {title}\n\n{_table(['', *(column.title for column in used)], rows)}")
    return "\n\n".join(parts)


# --- targets --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A figure, its target and its value."""

    figure: str
    target: str
    reached: str
    met: bool | None
    """None where it was not measured."""


def targets(taken: Measurements) -> list[Target]:
    """The targets of the task system, as ratios of the medians of this run."""
    found: list[Target] = []

    def ours(figure: str) -> float | None:
        return taken.median("ours", figure)

    def ratio(
        what: str, figure: str, other: float | None, name: str, least: float, *, percent: bool = False
    ) -> None:
        mine = ours(figure)
        wanted = f"≥ {least:.0%} of {name}" if percent else f"≥ {least:g} times {name}"
        if mine is None or not other:
            found.append(Target(what, wanted, "not measured", None))
            return
        reached = mine / other
        found.append(
            Target(what, wanted, f"{reached:.0%}" if percent else f"{reached:.1f} times", reached >= least)
        )

    def limit(what: str, wanted: str, value: float | None, most: float | None, unit: str = "") -> None:
        if value is None or most is None:
            found.append(Target(what, wanted, "not measured", None))
            return
        found.append(Target(what, wanted, f"{_short(value)}{unit}", value <= most))

    def best(figure: str, choose: Callable[[Iterable[float]], float]) -> tuple[float | None, str]:
        others = taken.of_others(figure)
        if not others:
            return None, "the best peer"
        value = choose(others.values())
        return value, next(peer.title for peer in taken.peers if others.get(peer.name) == value)

    fastest, name = best("drain", max)
    ratio("no-op drain, one process", "drain", fastest, f"the fastest peer ({name})", 6)
    ratio(
        *("no-op drain, one process", "drain", taken.median("bare-task", "drain")),
        *("the bare loop with a task per message", 0.7),
        percent=True,
    )
    labelled, bare = taken.median("ours-labelled", "drain"), taken.median("bare-task", "drain")
    if labelled is not None and bare is not None:
        reached = labelled / bare
        wanted = "≥ 70% of the bare loop with a task per message"
        found.append(Target("the same, of messages with labels", wanted, f"{reached:.0%}", reached >= 0.7))
    ratio("drain, a mutex each", "mutex", taken.median("reference", "mutex"), "diracx-tasks 0.7.0", 5)
    ratio(
        *("drain, a mutex each", "mutex", taken.median("bare-locks", "mutex")),
        *("the bare loop with batched locks", 0.6),
        percent=True,
    )
    # Who has no bulk call may still submit faster one by one.
    fastest, name = max(best("bulk", max), best("one_by_one", max), key=lambda found: found[0] or 0.0)
    ratio("bulk submission", "bulk", fastest, f"the fastest peer in any way ({name})", 3)
    p50, p99 = ours("latency_p50"), ours("latency_p99")
    for percentile, value in (("p50", p50), ("p99", p99)):
        least, name = best(f"latency_{percentile}", min)
        known = "" if least is None else f", {_short(least)} ms ({name})"
        limit(f"latency at light load, {percentile}", f"better than every peer{known}", value, least, " ms")
    spread = None if p50 is None or p99 is None else p99 / p50
    limit("latency at light load, p99 / p50", "≤ 4", spread, 4)
    least, name = best("queued_bytes", min)
    known = "" if least is None else f", {_bytes(least)} ({name})"
    limit("Redis bytes per queued task", f"≤ the leanest peer{known}", ours("queued_bytes"), least)
    # No task leaves a part of a byte: less than half of one is what the system itself keeps.
    limit("Redis bytes left over per done task", "0 (less than half of one)", ours("left_bytes"), 0.5)
    limit("worker start to first task", "≤ 0.8 s", ours("start"), 0.8, " s")
    limit("RSS of a worker", "≤ 70 MB", ours("rss"), 70, " MB")
    ratio(
        *("drain with 1,000,000 waiting", "backlog", ours("backlog_short"), "the rate with 10,000", 0.9),
        percent=True,
    )
    limit("idle worker, processor", "≤ 1 % of a core", ours("idle_processor"), 1, " %")
    limit("idle worker, commands", "≤ 2 per second", ours("idle_commands"), 2, "/s")
    return found


def targets_table(taken: Measurements) -> str:
    mark = {True: "yes", False: "**no**", None: ""}
    rows = [[each.figure, each.target, each.reached, mark[each.met]] for each in targets(taken)]
    return _table(["figure", "target", "reached", "met"], rows)


# --- the whole ------------------------------------------------------------------------------------------------


def problems(taken: Measurements) -> str:
    """List the failures, and the peers that do not take part, each once."""
    titles = {peer.name: peer.title for peer in taken.peers}
    lines = []
    for problem in taken.problems:
        what = "left out" if problem.skipped else "failed"
        lines.append(f"- {titles[problem.peer]}, {problem.scenario}: {what}: {problem.reason}")
    return "\n".join(dict.fromkeys(lines))


def section(taken: Measurements, plots: Iterable[str]) -> str:
    images = "\n".join(f"![{name}]({name}.svg)" for name in plots)
    missing = problems(taken)
    return f"""## Side by side with other task systems

Measured by `make bench-peers` on {datetime.now(UTC):%Y-%m-%d} in {taken.seconds / 60:.0f} minutes: {machine()}.
Medians of {taken.rounds} rounds; in each, all run each scenario on the same embedded Valkey, emptied
before every run. Load of the machine at the start: {taken.load:.1f}. Absolute figures of a shared machine vary;
compare figures of one run.

{images}

{tables(taken)}

### Targets

{targets_table(taken)}

### Missing figures

{missing or "None."}

[How it is measured](peers/README.md)."""


def as_json(taken: Measurements) -> dict[str, Any]:
    """Return all measurements for other programs."""
    return {
        "machine": machine(),
        "rounds": taken.rounds,
        "seconds": round(taken.seconds, 1),
        "load": taken.load,
        "peers": {
            peer.name: {
                "title": peer.title,
                "figures": {
                    figure: {"median": taken.median(peer.name, figure), "rounds": values}
                    for (name, figure), values in taken.values.items()
                    if name == peer.name
                },
            }
            for peer in taken.peers
        },
        "problems": [vars(problem) for problem in taken.problems],
        "targets": [vars(target) for target in targets(taken)],
    }


def in_order(names: Iterable[str]) -> list[Peer]:
    """The peers of these names, in the order of the catalogue."""
    wanted = set(names)
    return [peer for peer in PEERS if peer.name in wanted]
