"""`queue`: look at the queues and the delayed tasks; empty a queue."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ..confirm import confirm
from ..options import JsonOption, ModuleOption, RedisUrlFileOption, RedisUrlOption
from ..output import echo, echo_json
from .inspect import AfterOption, LimitOption, ask, print_json

if TYPE_CHECKING:
    from redis.asyncio import Redis

app = typer.Typer(help="Look at the nine queues and at delayed tasks; empty a queue.", no_args_is_help=True)

QueueArgument = Annotated[
    str, typer.Argument(metavar="QUEUE", help="priority:size, as normal:medium; `queue list` has all.")
]


class Reason(StrEnum):
    """Why a task is delayed."""

    AT_TIME = "at_time"
    RETRY = "retry"
    LOCK = "lock"
    RATE = "rate"


@app.command("list")
def list_(
    as_json: JsonOption = False,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """List the queues, most urgent first: how many wait and run, the oldest, rates in and out.

    Rates are of the last five minutes, and there as long as a worker reports.

    Example: diracx-task-run queue list --json
    """
    from ... import operations as monitor
    from .monitor_view import print_queues

    found = ask(redis_url, redis_url_file, monitor.queues)
    if as_json:
        print_json(found)
    else:
        print_queues(found)


@app.command("peek")
def peek(
    queue: QueueArgument,
    limit: LimitOption = 20,
    after: AfterOption = None,
    as_json: JsonOption = False,
    module: ModuleOption = None,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """List what waits in a queue, in the order in which workers will take it. Nothing is taken out.

    Secret arguments are shown as •••.

    Example: diracx-task-run queue peek normal:medium --limit 5
    """
    from ... import operations as monitor
    from ..runtime.registry import load_registry
    from .monitor_view import print_queued

    registry = load_registry(module)
    page = ask(
        redis_url, redis_url_file, lambda redis: monitor.peek(redis, queue, limit, after, registry=registry)
    )
    if as_json:
        print_json(page)
    else:
        print_queued(page)


@app.command("delayed")
def delayed(
    reason: Annotated[Reason | None, typer.Option(help="Only those that are delayed for this.")] = None,
    limit: LimitOption = 20,
    after: AfterOption = None,
    as_json: JsonOption = False,
    module: ModuleOption = None,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """List delayed tasks, first what is due first: until a time, for a retry, for a lock, for quota.

    Example: diracx-task-run queue delayed --reason lock
    """
    from ... import operations as monitor
    from ..runtime.registry import load_registry
    from .monitor_view import print_delayed

    registry = load_registry(module)
    why: monitor.DelayReason | None = None if reason is None else reason.value
    page = ask(
        redis_url, redis_url_file, lambda redis: monitor.delayed(redis, why, limit, after, registry=registry)
    )
    if as_json:
        print_json(page)
    else:
        print_delayed(page)


@app.command("purge")
def purge(
    queue: QueueArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """Cancel everything that waits in a queue. What runs, is delayed, or comes in meanwhile, stays.

    Groups, and whoever waits for a result, hear that the tasks were cancelled. Asks first.

    Example: diracx-task-run queue purge background:large --yes
    """
    from ... import operations as monitor
    from ...operations.audited_actions import Deeds
    from ...operations.cursors import streams_of_queue

    async def look(redis: Redis) -> int:
        streams_of_queue(queue)
        return next(each.backlog for each in await monitor.queues(redis) if each.name == queue)

    waiting = ask(redis_url, redis_url_file, look)
    if waiting:
        confirm(f"Cancel {waiting} tasks that wait in {queue}?", yes)
    number = 0
    if waiting:
        number = ask(redis_url, redis_url_file, lambda redis: Deeds.at_command_line(redis).purge(queue))
    if as_json:
        echo_json({"queue": queue, "cancelled": number})
    else:
        echo(f"{number} cancelled")
