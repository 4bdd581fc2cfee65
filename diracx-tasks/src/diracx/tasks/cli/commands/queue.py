"""`queue` and `cancel`: inspect the queues and the delayed tasks; purge a queue, cancel tasks."""

from __future__ import annotations

from typing import Annotated

import typer
from redis.asyncio import Redis

from ... import operations
from ...operations import DelayReason
from ...operations.audited_actions import AuditedActions
from ...operations.cursors import streams_of_queue
from ...operations.views import DELAYED, QUEUED, QUEUES
from ...plumbing.broker import published
from ..errors import CliError, one_line
from ..options import JsonOption, LimitOption, YesOption, command_group
from ..output import confirm, report, show
from ..runtime.server import Listing, Server

app = command_group("queue", "Inspect the nine queues and the delayed tasks; purge a queue.")

QueueArgument = Annotated[
    str, typer.Argument(metavar="QUEUE", help="priority:size, as normal:medium; see `queue list`.")
]


@app.command("list")
def list_(*, as_json: JsonOption = False, server: Server) -> None:
    """List the queues by priority: waiting and running tasks, age of the oldest, rates in and out.

    Rates are averages over five minutes; `-` if no worker reports.

    Example: diracx-task-run queue list --json
    """
    show(QUEUES, server.query(operations.queues), as_json)


@app.command("peek")
def peek(*, queue: QueueArgument, limit: LimitOption = 20, listing: Listing) -> None:
    """List the tasks that wait in a queue, in the order in which workers will fetch them. Removes nothing.

    Secret arguments are shown as •••.

    Example: diracx-task-run queue peek normal:medium --limit 5
    """
    listing.show(QUEUED, operations.peek, queue=queue, limit=limit)


@app.command("delayed")
def delayed(
    *,
    reason: Annotated[DelayReason | None, typer.Option(help="Only those delayed for this reason.")] = None,
    limit: LimitOption = 20,
    listing: Listing,
) -> None:
    """List delayed tasks by due time: those that wait for a time, a retry, a lock, or quota.

    Example: diracx-task-run queue delayed --reason lock
    """
    listing.show(DELAYED, operations.delayed, reason=reason, limit=limit)


@app.command("purge")
def purge(*, queue: QueueArgument, yes: YesOption = False, as_json: JsonOption = False, server: Server) -> None:
    """Cancel all tasks that wait in a queue; not those that run, are delayed, or are submitted meanwhile.

    Callback groups, and callers that wait for a result, are notified of the cancellation. Prompts first.

    Example: diracx-task-run queue purge background:large --yes
    """

    async def waiting_tasks(redis: Redis) -> int:
        streams_of_queue(queue)
        return next(each.backlog for each in await operations.queues(redis) if each.name == queue)

    number = 0
    if waiting := server.query(waiting_tasks):
        confirm(f"Cancel {waiting} tasks that wait in {queue}?", yes)
        number = server.query(lambda redis: AuditedActions.for_command_line(redis).purge(queue))
    report({"queue": queue, "cancelled": number}, [f"{number} cancelled"], as_json)


@app.command("downgrade")
def downgrade(*, as_json: JsonOption = False, server: Server) -> None:
    """Convert waiting tasks to the format of diracx-tasks 0.7. Stop workers and schedulers first.

    Delayed tasks whose arguments 0.7 would lose are kept; exits with 1 if there are such, or if a process runs.

    Example: diracx-task-run queue downgrade
    """
    try:
        done = server.query(published.downgrade)
    except published.StillRunningError as error:
        raise CliError(f"{error}: stop it and repeat the command") from error
    report(done, [", ".join(f"{number} {what}" for what, number in done.items())], as_json)
    if done["kept"]:
        raise CliError(f"{done['kept']} delayed tasks have arguments that 0.7 would lose: they were not converted")


def cancel(
    *,
    task_ids: Annotated[
        list[str], typer.Argument(metavar="ID", help="Task ids, as returned by `submit` and `schedule()`.")
    ],
    as_json: JsonOption = False,
    server: Server,
) -> None:
    """Cancel tasks: queued, delayed, retrying, waiting for a lock, or running.

    Prints the state in which each was found. Waiting tasks are removed immediately; a running task is cancelled by
    its worker within about a second, is not retried and does not become a dead letter. Exits with 1 if an id is
    unknown: the task has ended or never existed.

    Example: diracx-task-run cancel 0f3c6dd2a7b84c0e9a3c5b1d8e7f6a90
    """
    ids = list(dict.fromkeys(task_ids))
    found = server.run(lambda broker: AuditedActions.for_command_line(broker.redis).cancel(broker, ids))
    records = [{"task_id": task, "found": str(place)} for task, place in found.items()]
    report(records, (f"{one_line(task)}  {place}" for task, place in found.items()), as_json)
    unknown = [task for task, place in found.items() if place == "unknown"]
    if unknown:
        raise CliError(
            f"nothing to cancel under {', '.join(map(repr, unknown))}: no such task, or it has ended; "
            "`diracx-task-run submit` prints ids"
        )
