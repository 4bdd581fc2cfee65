"""How what goes on looks in a terminal."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ..errors import one_line, shortened_line
from ..output import console, echo, echo_json, show_table, styled, table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ...operations import (
        DelayedTask,
        Failure,
        Holder,
        Lock,
        Page,
        Queue,
        QueuedTask,
        RunningTask,
        Snapshot,
        TaskStats,
        WaitingLetter,
        Worker,
    )
    from ...operations.audit import AuditEntry
    from ...operations.health import Health

_LONGEST_ARGUMENTS = 60
_LONGEST_ERROR = 80


# --- pieces -------------------------------------------------------------------------------------------------


def age(seconds: float | None) -> str:
    """A time for reading: `0.4 s`, `12 s`, `3 min`, `5.1 h`, `2.0 d`."""
    if seconds is None:
        return "-"
    seconds = max(0.0, seconds)
    for length, unit in ((86400, "d"), (3600, "h")):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    if seconds >= 10:
        return f"{seconds:.0f} s"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds * 1000:.0f} ms"


def since(moment: datetime | None) -> str:
    """How long ago that was."""
    return "-" if moment is None else age((datetime.now(UTC) - moment).total_seconds())


def _size(number: int | None) -> str:
    return "-" if number is None else f"{number / (1 << 20):,.0f} MiB"


def _number(number: int | None) -> str:
    return "-" if number is None else str(number)


def _rate(per_second: float | None) -> str:
    return "-" if per_second is None else f"{per_second:,.2f}" if per_second < 10 else f"{per_second:,.0f}"


def _arguments(arguments: dict[str, Any] | None, message_bytes: int | None) -> str:
    from ...operations.cursors import HEAD_BYTES

    if arguments is None:
        return "-" if message_bytes is None or message_bytes <= HEAD_BYTES else f"({message_bytes / 1e6:.1f} MB)"
    shown = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items())
    return shortened_line(shown, _LONGEST_ARGUMENTS)


def _print(made: Table, nothing: str, page: Page[Any] | None = None) -> None:
    show_table(made, nothing)
    if page is not None and page.after is not None:
        echo(f"there may be more: --limit, or --after '{one_line(page.after)}'", err=True)


# --- status -------------------------------------------------------------------------------------------------


async def show_status(look: Callable[[], Awaitable[Health]], every: float | None, as_json: bool) -> None:
    """Show how the system is, once or (`every` so many seconds) again and again."""
    if as_json:
        while True:
            seen = await look()
            echo_json(status_json(seen), indent=2 if every is None else None)
            if every is None:
                return
            await asyncio.sleep(every)
    shown = console()
    if every is None or not shown.is_terminal:
        while True:
            shown.print(render_status(await look()))
            if every is None:
                return
            await asyncio.sleep(every)
    from rich.live import Live

    with Live(console=shown, screen=True, auto_refresh=False) as live:
        while True:
            live.update(render_status(await look()), refresh=True)
            await asyncio.sleep(every)


def status_json(health: Health) -> dict[str, Any]:
    """As `status --json` has it."""
    from ...operations.masking import masked_json

    shown: dict[str, Any] = masked_json(health.as_json())
    return shown


def render_status(health: Health) -> RenderableType:
    """A page: what is wrong, and what there is."""
    from rich.console import Group
    from rich.text import Text

    seen = health.snapshot
    now = datetime.now(UTC) if seen is None else seen.at
    lines: list[RenderableType] = [Text(f"{now:%Y-%m-%d %H:%M:%S} UTC", style="bold")]
    for alert in health.alerts:
        seconds = 0.0 if alert.since is None else (now - alert.since).total_seconds()
        lasts = f" for {age(seconds)}" if seconds >= 1 else ""
        lines.append(styled(f"! {alert.summary}", _STYLES[alert.severity]))
        lines.append(Text(f"  {alert.severity}{lasts}: {one_line(alert.remedy)}"))
    if not health.alerts:
        lines.append(Text("all is well" + (", as far as is looked at" if health.unchecked else ""), style="green"))
    lines += [styled(f"not looked at: {each}", "dim") for each in health.unchecked]
    if seen is not None:
        lines += [Text(), *_figures(seen)]
    return Group(*lines)


_STYLES = {"critical": "bold red", "warning": "bold yellow", "unknown": "bold magenta"}


def check_lines(health: Health) -> list[str]:
    """As Nagios wants it: the state and the worst alert on the first line, then all of them."""
    alerts = [f"{alert.severity.upper()}: {one_line(alert.summary)}" for alert in health.alerts]
    worst = one_line(health.alerts[0].summary) if health.alerts else "all health checks are well"
    more = f" (and {len(alerts) - 1} more)" if len(alerts) > 1 else ""
    return [f"{health.severity.upper()} - {worst}{more}", *alerts[: len(alerts) if more else 0]]


def _figures(seen: Snapshot) -> list[RenderableType]:
    from rich.text import Text

    alive = [worker for worker in seen.workers if worker.alive]
    slots = sum(worker.slots or 0 for worker in alive)
    used = sum(worker.slots_used or 0 for worker in alive)
    limit = "" if seen.memory_limit_bytes is None else f" of {_size(seen.memory_limit_bytes)}"
    delayed = ", ".join(f"{number} {_WHY[reason]}" for reason, number in seen.delayed.items() if number)
    return [
        _queue_table(seen.queues),
        Text(),
        Text(f"workers      {len(alive)}, {used} of {slots} slots in use"),
        Text(f"delayed      {delayed or 'nothing'}"),
        Text(f"schedules    {seen.schedules}, {'a scheduler leads' if seen.scheduler_leads else 'nobody leads'}"),
        Text(f"groups       {seen.groups} have not called back"),
        Text(f"Redis        {_size(seen.memory_bytes)}{limit}"),
    ]


_WHY = {
    "at_time": "until their time",
    "retry": "for a retry",
    "lock": "behind locks",
    "rate": "for quota",
}


# --- tables -------------------------------------------------------------------------------------------------


def _queue_table(queues: Sequence[Queue]) -> Table:
    return table(
        ("queue", "waiting", "oldest", "running", "in/s", "out/s"),
        [
            (
                queue.name,
                f"{queue.backlog:,}",
                age(queue.oldest_waiting_seconds),
                f"{queue.running:,}",
                _rate(queue.in_per_second),
                _rate(queue.out_per_second),
            )
            for queue in queues
        ],
        right=("waiting", "oldest", "running", "in/s", "out/s"),
    )


def print_queues(queues: Sequence[Queue]) -> None:
    """One line for each."""
    _print(_queue_table(queues), "no queues")


def print_workers(workers: Sequence[Worker]) -> None:
    """One line for each."""
    rows = [
        (
            worker.name,
            worker.size or "-",
            "-" if worker.slots is None else f"{worker.slots_used} of {worker.slots}",
            _worker_state(worker),
            since(worker.seen),
            since(worker.started),
            _size(worker.memory_bytes),
            worker.version or "-",
        )
        for worker in workers
    ]
    columns = ("worker", "size", "slots in use", "state", "last report", "up for", "memory", "version")
    _print(table(columns, rows, right=("slots in use", "last report", "up for", "memory")), "no worker runs")


def _worker_state(worker: Worker) -> str:
    if not worker.alive:
        return "dead"
    if (blocked := worker.blocked) is None:
        return "alive"
    return (
        f"blocked for {since(blocked.since)} by {blocked.task_name or 'a task'} {blocked.task_id or ''}".rstrip()
    )


def print_running(page: Page[RunningTask]) -> None:
    """One line for each."""
    rows = [
        (
            task.task_name,
            task.task_id,
            since(task.since) + (" (blocks its worker)" if task.blocks_worker else ""),
            str(task.attempt) + (f" (delivery {task.deliveries})" if task.deliveries > 1 else ""),
            task.vo or "-",
            task.worker,
            _arguments(task.arguments, task.message_bytes),
            ", ".join(task.locks) or "-",
        )
        for task in page.items
    ]
    columns = ("task", "task id", "for", "attempt", "VO", "worker", "arguments", "locks")
    _print(table(columns, rows, right=("for",)), "nothing runs (workers report every 5 s)", page)


def print_queued(page: Page[QueuedTask]) -> None:
    """One line for each."""
    rows = [
        (
            task.task_name or "(no task)",
            task.task_id or task.entry,
            since(task.waiting_since),
            _number(task.attempt),
            _arguments(task.arguments, task.message_bytes),
        )
        for task in page.items
    ]
    columns = ("task", "task id", "waits for", "attempt", "arguments")
    _print(table(columns, rows, right=("waits for",)), "nothing waits", page)


def print_delayed(page: Page[DelayedTask]) -> None:
    """One line for each."""
    rows = [
        (
            task.task_name or "(no task)",
            task.task_id,
            task.reason,
            f"{task.due:%Y-%m-%d %H:%M:%S}",
            task.queue,
            _arguments(task.arguments, task.message_bytes),
            task.lock or shortened_line(task.last_error or "-", _LONGEST_ERROR),
        )
        for task in page.items
    ]
    columns = ("task", "task id", "why", "due (UTC)", "queue", "arguments", "lock, or last error")
    _print(table(columns, rows, right=("due (UTC)",)), "nothing is delayed", page)


def print_stats(stats: Sequence[TaskStats]) -> None:
    """One line for each."""
    rows = [
        (
            each.task_name,
            f"{each.done:,}",
            f"{each.failed:,}",
            "-" if each.failure_rate is None else f"{each.failure_rate:.1%}",
            f"{each.retried:,}",
            f"{each.dead:,}",
            *(age(value) for value in (each.run.p50_seconds, each.run.p95_seconds, each.run.p99_seconds)),
            *(age(value) for value in (each.queue.p50_seconds, each.queue.p95_seconds)),
        )
        for each in stats
    ]
    columns = ("task", "done", "failed", "rate", "retried", "dead")
    times = ("run p50", "p95", "p99", "queue p50", "queue p95")
    _print(table((*columns, *times), rows, right=(*columns[1:], *times)), "nothing has ended in this time")


def print_failures(failures: Sequence[Failure]) -> None:
    """Each with its traceback, the newest last."""
    for failure in reversed(failures):
        where = f"{failure.at:%Y-%m-%d %H:%M:%S} on {failure.worker}, attempt {failure.attempt}, {failure.outcome}"
        echo("")
        echo(one_line(f"{failure.task_name or '(no task)'} {failure.task_id}: {where}"))
        for line in (failure.traceback or f"{failure.type}: {failure.message}").splitlines():
            echo(f"  {line}")


def print_waiting_letters(page: Page[WaitingLetter]) -> None:
    """One line for each."""
    rows = [
        (
            f"{each.buried:%Y-%m-%d %H:%M:%S}",
            each.task_name or "-",
            each.task_id or "-",
            each.reason,
            _number(each.failed_attempts),
            _arguments(each.arguments, each.message_bytes),
            shortened_line(each.detail, _LONGEST_ARGUMENTS),
        )
        for each in page.items
    ]
    columns = ("buried (UTC)", "task", "task id", "reason", "attempts", "arguments", "detail")
    _print(table(columns, rows, right=["attempts"]), "no dead letters wait in Redis", page)


def print_audit(page: Page[AuditEntry]) -> None:
    """One line for each."""
    rows = [
        (
            f"{entry.at:%Y-%m-%d %H:%M:%S}",
            entry.who,
            entry.via,
            entry.action,
            shortened_line(entry.target, _LONGEST_ERROR),
            shortened_line(
                ("failed: " if entry.ok is False else "") + (entry.outcome or "not known"), _LONGEST_ERROR
            ),
        )
        for entry in page.items
    ]
    _print(table(("at (UTC)", "who", "via", "what", "to", "outcome"), rows), "nobody has done anything yet", page)


def _quota(lock: Lock) -> str:
    limit = "" if lock.limit is None else f" of {lock.limit}"
    window = "" if lock.window_seconds is None else f" in {age(lock.window_seconds)}"
    return f"{lock.held}{limit}{window}"


def _holder(holder: Holder) -> str:
    if holder.task_id is not None:
        return f"{holder.task_name} {holder.task_id}"
    return f"a task of {holder.worker}" if holder.worker is not None else "somebody outside the task system"


def _remaining(moment: datetime | None) -> str:
    return "-" if moment is None else f"in {age((moment - datetime.now(UTC)).total_seconds())}"


def print_locks(page: Page[Lock]) -> None:
    """One line for each."""
    rows = [
        (
            lock.key,
            lock.kind,
            _quota(lock),
            str(lock.waiters),
            _remaining(lock.expires),
            ", ".join(_holder(holder) for holder in lock.holders[:3])
            + (f" and {lock.held - 3} more" if len(lock.holders) > 3 else "")
            or "-",
        )
        for lock in page.items
    ]
    columns = ("lock", "kind", "held", "waiting", "ends, unless renewed", "held by")
    _print(table(columns, rows, right=("held", "waiting")), "no locks", page)


def print_lock(lock: Lock) -> None:
    """All about one."""
    echo(f"{'lock':<11} {one_line(lock.key)}")
    echo(f"{'kind':<11} {lock.kind}")
    echo(f"{'held':<11} {_quota(lock)}")
    echo(f"{'waiting':<11} {lock.waiters}")
    if lock.held:
        echo(f"{'ends':<11} {_remaining(lock.expires)}, unless it is renewed")
    for holder in lock.holders:
        until = "" if holder.until is None else f", until {_remaining(holder.until)}"
        where = "" if holder.worker is None else f" on {holder.worker}"
        echo(f"{'held by':<11} {one_line(_holder(holder) + where)}{until}")


def hit(holder: Holder) -> str:
    """What a release does to a holder."""
    if holder.worker is None:
        return "held by somebody outside the task system, who will not be told"
    if holder.task_id is None:
        return f"held by a task of worker {holder.worker}, which has not reported it yet: it will be cancelled"
    return f"held by {holder.task_name} {holder.task_id} on {holder.worker}: it will be cancelled"
