"""`queue`: inspect the queues and the delayed tasks; purge a queue."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from redis.asyncio import Redis

from ... import operations
from ...operations import DelayReason
from ...operations.audited_actions import AuditedActions
from ...operations.cursors import streams_of_queue
from ...operations.views import DELAYED, QUEUED, QUEUES
from ...plumbing.broker import published
from ..errors import CliError
from ..options import AfterOption, JsonOption, LimitOption, YesOption, command_group
from ..output import confirm, echo, echo_json, show
from ..runtime.server import Server, ServerAndTasks

app = command_group("queue", "Inspect the nine queues and the delayed tasks; purge a queue.")

QueueArgument = Annotated[
    str, typer.Argument(metavar="QUEUE", help="priority:size, as normal:medium; `queue list` has all.")
]


class Reason(StrEnum):
    """Reason for the delay of a task."""

    AT_TIME = "at_time"
    RETRY = "retry"
    LOCK = "lock"
    RATE = "rate"


@app.command("list")
def list_(*, as_json: JsonOption = False, server: Server) -> None:
    """List the queues, most urgent first: waiting and running tasks, the oldest, rates in and out.

    Rates are of the last five minutes, and known while a worker reports.

    Example: diracx-task-run queue list --json
    """
    show(QUEUES, server.query(operations.queues), as_json)


@app.command("peek")
def peek(
    *,
    queue: QueueArgument,
    limit: LimitOption = 20,
    after: AfterOption = None,
    as_json: JsonOption = False,
    server: ServerAndTasks,
) -> None:
    """List the tasks that wait in a queue, in the order in which workers will fetch them. Nothing is taken out.

    Secret arguments are shown as •••.

    Example: diracx-task-run queue peek normal:medium --limit 5
    """
    registry = server.registry
    page = server.query(lambda redis: operations.peek(redis, queue, limit, after, registry=registry))
    show(QUEUED, page, as_json)


@app.command("delayed")
def delayed(
    *,
    reason: Annotated[Reason | None, typer.Option(help="Only those that are delayed for this reason.")] = None,
    limit: LimitOption = 20,
    after: AfterOption = None,
    as_json: JsonOption = False,
    server: ServerAndTasks,
) -> None:
    """List delayed tasks, those due first at the top: until a time, for a retry, for a lock, for quota.

    Example: diracx-task-run queue delayed --reason lock
    """
    registry = server.registry
    only: DelayReason | None = None if reason is None else reason.value
    page = server.query(lambda redis: operations.delayed(redis, only, limit, after, registry=registry))
    show(DELAYED, page, as_json)


@app.command("purge")
def purge(*, queue: QueueArgument, yes: YesOption = False, as_json: JsonOption = False, server: Server) -> None:
    """Cancel all tasks that wait in a queue. Tasks that run, are delayed, or come in meanwhile stay.

    Callback groups, and callers that wait for a result, learn that the tasks were cancelled. Asks first.

    Example: diracx-task-run queue purge background:large --yes
    """

    async def waiting_tasks(redis: Redis) -> int:
        streams_of_queue(queue)
        return next(each.backlog for each in await operations.queues(redis) if each.name == queue)

    number = 0
    if waiting := server.query(waiting_tasks):
        confirm(f"Cancel {waiting} tasks that wait in {queue}?", yes)
        number = server.query(lambda redis: AuditedActions.at_command_line(redis).purge(queue))
    if as_json:
        echo_json({"queue": queue, "cancelled": number})
    else:
        echo(f"{number} cancelled")


@app.command("downgrade")
def downgrade(*, as_json: JsonOption = False, server: Server) -> None:
    """Give all that waits the form of diracx-tasks 0.7, for the way back to it. Stop workers and schedulers first.

    Delayed tasks whose arguments 0.7 would lose stay here; exits with 1 when there are such, or something runs.

    Example: diracx-task-run queue downgrade
    """
    try:
        done = server.query(published.downgrade)
    except published.StillRunningError as error:
        raise CliError(f"{error}: stop it, and repeat this") from error
    if as_json:
        echo_json(done)
    else:
        echo(", ".join(f"{number} {what}" for what, number in done.items()))
    if done["kept"]:
        raise CliError(f"{done['kept']} delayed tasks have arguments that 0.7 would lose: they stay as they are")
