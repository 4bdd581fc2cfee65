"""Commands that list and show: `list`, `workers`, `running`, `audit`, `tasks stats` and `group`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer
from redis.asyncio import Redis

from ... import operations
from ...operations import Window
from ...operations.audit import audit_page
from ...operations.task_classes import task_classes
from ...operations.views import AUDIT, GROUPS, RUNNING, STATISTICS, TASK_CLASSES, WORKERS
from ...plumbing.broker.groups import GroupStatus, read_group
from ...plumbing.registry import unselected_tasks
from ...plumbing.task_names import resolve_task_name
from ..errors import CliError, one_line
from ..options import AfterOption, JsonOption, LimitOption, ModuleOption, TaskOption, command_group
from ..output import echo, echo_traceback, field_lines, print_json, report, show
from ..runtime.registry import find_task, load_registry
from ..runtime.server import Listing, Server, ServerAndTasks


def list_tasks(*, as_json: JsonOption = False, module: ModuleOption = None) -> None:
    """List the task classes that are installed or in a --module.

    Warns of installed distributions whose tasks are ignored because they are not extensions of DiracX.

    Example: diracx-task-run list --module my_tasks.py
    """
    show(TASK_CLASSES, task_classes(load_registry(module)), as_json)
    for line in unselected_tasks():
        echo(f"warning: {one_line(line)}", err=True)


def workers(*, as_json: JsonOption = False, server: Server) -> None:
    """List the workers: size, slots in use, state, last report, time since the start, memory.

    Workers report every 5 s, or every 50 s while nothing changes. `blocked`: a task blocks the event loop of the
    worker; --json has the stack. `dead`: its lease has expired.

    Example: diracx-task-run workers --json
    """
    show(WORKERS, server.query(operations.workers), as_json)


def running(*, limit: LimitOption = 100, listing: Listing) -> None:
    """List the running tasks, longest first: run time, attempt, worker, locks, arguments.

    Workers report every 5 s, and at most 200 tasks each. Secret arguments are shown as •••.

    Example: diracx-task-run running --limit 20
    """
    listing.show(RUNNING, operations.running, limit=limit)


def audit(
    *,
    limit: LimitOption = 50,
    after: AfterOption = None,
    vo: Annotated[
        str | None,
        typer.Option("--vo", metavar="VO", help="List actions of this VO's members, not of administrators."),
    ] = None,
    as_json: JsonOption = False,
    server: Server,
) -> None:
    """List audited actions, newest first: user, interface (cli, dashboard, api), action, target, outcome.

    A user of the command line is listed as user@host. About 10,000 actions are kept of administrators, and as many
    of the members of each VO.

    Example: diracx-task-run audit --limit 10
    """
    show(AUDIT, server.query(lambda redis: audit_page(redis, limit, after, vo=vo)), as_json)


task_statistics = command_group("tasks", "Show statistics of task classes.")


@task_statistics.command("stats")
def stats(
    *,
    window: Annotated[Window, typer.Option(help="Over the last hour, or the last day.")] = "hour",
    failures: Annotated[
        int, typer.Option(min=0, metavar="N", help="Show the last N failures, too, with their tracebacks.")
    ] = 0,
    task: TaskOption = None,
    as_json: JsonOption = False,
    server: ServerAndTasks,
) -> None:
    """Show statistics by task class: done, failed, retried, dead, run time and time in the queue.

    Times are percentiles, at most 19 % too high. Time in the queue includes waiting for locks.

    Example: diracx-task-run tasks stats --window day --failures 3
    """

    async def read(redis: Redis) -> Any:
        found = await operations.stats(redis, window)
        name = None
        if task is not None:
            ended = [each.task_name for each in found]
            name = resolve_task_name(task, ended + await operations.failed_task_names(redis))
            name = name or find_task(server.registry, task)
            found = [each for each in found if each.task_name == name]
        if not failures:
            return found, []
        return found, (await operations.failures(redis, failures, task_name=name)).items

    statistics, failed = server.query(read)
    if as_json:
        print_json({"stats": statistics, "failures": failed})
        return
    show(STATISTICS, statistics, as_json)
    for failure in reversed(failed):
        where = f"{failure.at:%Y-%m-%d %H:%M:%S} on {failure.worker}, attempt {failure.attempt}, {failure.outcome}"
        title = f"{failure.task_name or '(no task)'} {failure.task_id}: {where}"
        echo_traceback(title, failure.traceback or f"{failure.type}: {failure.message}")


#: Maximum number of listed children.
_NAMED_CHILDREN = 10

groups = command_group("group", "Inspect pending callback groups.")


@groups.command("show")
def show_group(
    *,
    group_id: Annotated[str, typer.Argument(metavar="ID", help="Group id, as `spawn_with_callback` returns it.")],
    as_json: JsonOption = False,
    server: Server,
) -> None:
    """Show one group: state, callback, counts of its children, and which are pending or failed.

    A group is removed when its callback is submitted; exits with 1 then.

    Example: diracx-task-run group show 0f3c6dd2a7b84c0e9a3c5b1d8e7f6a90
    """
    status = server.query(lambda redis: read_group(redis, group_id))
    if status is None:
        raise CliError(
            f"no group {group_id!r}: its callback was submitted, it has expired, or it never existed; "
            "see `diracx-task-run group list`"
        )
    report(status, field_lines(_fields(status)), as_json, indent=2)


@groups.command("list")
def list_(*, as_json: JsonOption = False, server: Server) -> None:
    """List the pending callback groups, oldest first.

    Example: diracx-task-run group list --json
    """
    found = server.query(operations.groups)
    if as_json:
        children = ("pending_children", "failed_children")  # `group show` has them
        print_json([{k: v for k, v in asdict(status).items() if k not in children} for status in found])
    else:
        show(GROUPS, found, as_json)


def _fields(status: GroupStatus) -> Iterator[tuple[str, str]]:
    counts = f"{status.succeeded} succeeded, {status.failed} failed, {status.pending} pending"
    yield "group", status.group_id
    yield "state", str(status.state)
    yield "children", f"{status.total}: {counts}"
    yield "callback", status.callback
    yield "on failure", status.on_failure or "-"
    yield "created", status.created.isoformat(timespec="seconds")
    yield "expires", status.expires.isoformat(timespec="seconds")
    failed = [f"{child}  {error}" for child, error in status.failed_children.items()]
    for state, lines in ("failed", failed), ("pending", status.pending_children):
        yield from ((state, line) for line in lines[:_NAMED_CHILDREN])
        if len(lines) > _NAMED_CHILDREN:
            yield state, f"and {len(lines) - _NAMED_CHILDREN} more; all of them with --json"
