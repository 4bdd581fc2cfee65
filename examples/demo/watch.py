"""Read the state of all pilots from the database, and show it as a table."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diracx.db.sql import TaskQueueDB
from diracx.tasks.cli.runtime.supervisor import Child

from gubbins.db.sql import MyPilotDB
from gubbins.domain.pilot_states import ACTIVE, MyPilotStatus
from gubbins.logic import my_pilots as logic

from .site import VOS

if TYPE_CHECKING:
    from rich.table import Table

_ENDED = [status for status in MyPilotStatus if status not in ACTIVE]
_RATE_WINDOW_SECONDS = 10.0


@dataclass
class Watch:
    """Polls the pilots, and remembers the largest number seen at each compute element."""

    db: MyPilotDB
    summary: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    ces: list[dict[str, Any]] = field(default_factory=list)
    max_active_seen: dict[str, int] = field(default_factory=dict)
    task_queue_db: TaskQueueDB | None = None
    processes: Sequence[Child] = ()
    waiting_jobs: dict[str, int] = field(default_factory=dict)
    """Jobs that wait, by VO."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """Number of pilots by reported outcome."""
    restarts: Counter[str] = field(default_factory=Counter)
    """Processes that were started again, and how often."""
    _pids: dict[str, int] = field(default_factory=dict)
    _ends: deque[tuple[float, int]] = field(default_factory=deque)

    async def look(self) -> None:
        """Read the state of all pilots in one transaction."""

        async def look() -> None:
            self.summary = await logic.count_pilots(self.db)
            self.ces = await logic.list_ces(self.db)

        await self.db.run(look)
        self.outcomes = Counter()
        for by_ce in (await logic.count_reports(self.db)).values():
            for counts in by_ce.values():
                self.outcomes.update(counts)
        if self.task_queue_db is not None:
            for vo in VOS:
                queues = await logic.read_task_queues(self.task_queue_db, vo) or []
                self.waiting_jobs[vo] = sum(queue.jobs for queue in queues)
        for child in self.processes:
            if child.is_ready and child.process is not None:
                pid = child.process.pid
                self.restarts[child.name] += self._pids.setdefault(child.name, pid) != pid
                self._pids[child.name] = pid
        for ce in self.ces:
            active = sum(ces.get(ce["name"], {}).get(s, 0) for ces in self.summary.values() for s in ACTIVE)
            self.max_active_seen[ce["name"]] = max(active, self.max_active_seen.get(ce["name"], 0))
        now = time.monotonic()
        self._ends.append((now, self.total(*_ENDED)))
        while now - self._ends[0][0] > _RATE_WINDOW_SECONDS:
            self._ends.popleft()

    def total(self, *statuses: MyPilotStatus, vo: str | None = None) -> int:
        """Pilots in these states, of one VO or of all."""
        return sum(
            states.get(status, 0)
            for name, ces in self.summary.items()
            if vo in {None, name}
            for states in ces.values()
            for status in statuses
        )

    @property
    def per_second(self) -> float:
        """Pilots that came to their end per second, lately."""
        (first, before), (last, after) = self._ends[0], self._ends[-1]
        return (after - before) / (last - first) if last > first else 0.0

    def line(self) -> str:
        """The state in one line."""
        states = ", ".join(f"{self.total(status)} {status}" for status in MyPilotStatus)
        slots = ", ".join(f"{ce['name']} {ce['active']}/{ce['capacity']}" for ce in self.ces)
        jobs = ", ".join(f"{vo} {number}" for vo, number in self.waiting_jobs.items())
        again = "".join(f"; {name} was started again" for name in +self.restarts)
        said = ", ".join(f"{count} {outcome}" for outcome, count in sorted((+self.outcomes).items()))
        reports = f"; pilots say: {said}" if said else ""
        return f"{states}; slots in use: {slots}; waiting jobs: {jobs}{reports}{again}"

    def describe_processes(self) -> str:
        """The processes with their ids, and those that were started again."""
        return ", ".join(
            f"{name} {pid}" + (f" (started again: {self.restarts[name]})" if self.restarts[name] else "")
            for name, pid in self._pids.items()
        )

    async def report(self, vos: tuple[str, ...]) -> dict[str, Any]:
        """The summary that scripts read."""
        return {
            "pilots": {vo: {str(s): self.total(s, vo=vo) for s in MyPilotStatus} for vo in vos},
            "ces": {
                ce["name"]: {"capacity": ce["capacity"], "max_active_seen": self.max_active_seen[ce["name"]]}
                for ce in self.ces
            },
            "waiting_jobs": self.waiting_jobs,
            "outcomes": dict(+self.outcomes),
            "restarts": dict(+self.restarts),
            "illegal_transitions": await logic.count_illegal_histories(self.db),
        }

    def table(self, elapsed: float) -> Table:
        """Each VO at each CE by state, free slots, throughput."""
        from rich.table import Table
        from rich.text import Text

        styles = {
            MyPilotStatus.SUBMITTED: "yellow",
            MyPilotStatus.RUNNING: "cyan",
            MyPilotStatus.DONE: "green",
            MyPilotStatus.FAILED: "red",
        }
        shown = Table(
            title=f"Pilots after {elapsed:.0f} s: {self.total(*_ENDED)} ended, {self.per_second:.1f} per second",
            title_justify="left",
        )
        for column in ("CE", "VO"):
            shown.add_column(column)
        for status in MyPilotStatus:
            shown.add_column(str(status), justify="right", style=styles[status])
        shown.add_column("slots in use", justify="left", no_wrap=True)
        shown.add_column("free", justify="right")
        shown.add_column("waiting jobs of the VO", justify="right")
        for ce in self.ces:
            vos = sorted(vo for vo, ces in self.summary.items() if ce["name"] in ces) or ["-"]
            for row, vo in enumerate(vos):
                states = self.summary.get(vo, {}).get(ce["name"], {})
                first = row == 0
                bar = Text("■" * ce["active"], "cyan") + Text("·" * ce["available_slots"], "dim")
                shown.add_row(
                    ce["name"] if first else "",
                    vo,
                    *(str(states.get(status, 0)) for status in MyPilotStatus),
                    bar if first else "",
                    str(ce["available_slots"]) if first else "",
                    str(self.waiting_jobs.get(vo, "")),
                    end_section=row == len(vos) - 1,
                )
        return shown


@asynccontextmanager
async def watching(db: MyPilotDB, processes: Sequence[Child]) -> AsyncIterator[Watch]:
    """Watch the pilots, the jobs that wait and the processes."""
    task_queue_db = TaskQueueDB(os.environ["DIRACX_DB_URL_TASKQUEUEDB"])
    async with task_queue_db.engine_context():
        yield Watch(db, task_queue_db=task_queue_db, processes=processes)
