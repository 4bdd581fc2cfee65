"""`status`, `workers`, `running` and `tasks stats`: how it is, and what goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..errors import CliError, UsageProblem, explained_redis, one_line
from ..options import JsonOption, ModuleOption, RedisUrlFileOption, RedisUrlOption, resolve_redis_url
from ..output import echo, echo_json

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from ...operations.health import Health
    from ...plumbing.broker import RedisStreamBroker

_Answer = TypeVar("_Answer")

LimitOption = Annotated[int, typer.Option("--limit", min=1, metavar="N", help="At most so many.")]
AfterOption = Annotated[
    str | None, typer.Option("--after", metavar="PLACE", help="Read on: the `after` of the page before (--json).")
]


class Window(StrEnum):
    """Over which time is counted."""

    HOUR = "hour"
    DAY = "day"


def ask(
    redis_url: str | None, redis_url_file: str | None, question: Callable[[Redis], Awaitable[_Answer]]
) -> _Answer:
    """Put a question to the server.

    Raises:
        CliError: when the server cannot be reached, or refuses.
        UsageProblem: for what the question finds wrong with its own words (a ValueError).
    """
    from ..runtime.broker import open_broker

    url = resolve_redis_url(redis_url, redis_url_file)

    async def put() -> _Answer:
        async with open_broker(url) as broker:
            with explained_redis(url):
                try:
                    return await question(broker.redis)
                except ValueError as error:
                    raise UsageProblem(str(error)) from error

    return asyncio.run(put())


def print_json(value: Any) -> None:
    """As JSON, passwords of URLs masked."""
    from ...operations import as_json
    from ...operations.masking import masked_json

    echo_json(masked_json(as_json(value)), indent=2)


def status(
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again and again, until Ctrl-C; with --json, a line each time.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.2, metavar="SECONDS", help="With --watch: how often.")] = 2.0,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Exit as Nagios has it: 0 ok, 1 warning, 2 critical, 3 unknown; prints what is wrong."
        ),
    ] = False,
    as_json: JsonOption = False,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """Show how the system is: what the health checks found, the queues, workers, what is delayed.

    Costs the server little, however much is queued. Databases are those of DIRACX_DB_URL_<NAME>. Exits with 0 even
    when something is wrong, but for --check.

    Example: diracx-task-run status --check
    """
    if check:
        raise typer.Exit(_check(redis_url, redis_url_file, as_json))
    from ..runtime.broker import open_broker
    from .monitor_view import show_status

    url = resolve_redis_url(redis_url, redis_url_file)

    async def show() -> None:
        async with open_broker(url) as broker, _health(broker) as look:
            await show_status(look, every if watch else None, as_json)

    try:
        asyncio.run(show())
    except KeyboardInterrupt:
        if not watch:
            raise


def _check(redis_url: str | None, redis_url_file: str | None, as_json: bool) -> int:
    from ...plumbing.broker import RedisStreamBroker
    from .monitor_view import check_lines, status_json

    async def look() -> Health:
        # Not tried before: that the server does not answer is for the checks to say.
        broker = RedisStreamBroker(resolve_redis_url(redis_url, redis_url_file))
        try:
            async with _health(broker) as run:
                return await run()
        finally:
            await broker.shutdown()

    try:
        health = asyncio.run(look())
    except Exception as error:  # any other exit code would say something about the system
        echo(f"UNKNOWN - {one_line(str(error)) or type(error).__name__}")
        return 3
    if as_json:
        echo_json(status_json(health), indent=2)
    else:
        for line in check_lines(health):
            echo(line)
    return health.severity.exit_code


@asynccontextmanager
async def _health(broker: RedisStreamBroker) -> AsyncIterator[Callable[[], Awaitable[Health]]]:
    """What makes the health checks: of this server, and of the databases of the environment.

    Raises:
        CliError: a variable of a database or a threshold is wrong.
    """
    from ...operations.health import health_checks
    from ...plumbing.exceptions import TaskConfigError
    from ..runtime.environment import unchecked_task_db

    async with AsyncExitStack() as stack:
        task_db = await stack.enter_async_context(unchecked_task_db())
        try:
            checks = await stack.enter_async_context(health_checks(broker.redis, task_db))
        except TaskConfigError as error:
            raise CliError(str(error)) from error
        yield checks.run


def workers(
    as_json: JsonOption = False,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """List the workers: size, slots in use, since when they run, when they last reported, memory.

    One that is blocked has a task that keeps its event loop from going on; --json has its stack. One whose lease
    has ended is dead.

    Example: diracx-task-run workers --json
    """
    from ... import operations as monitor
    from .monitor_view import print_workers

    found = ask(redis_url, redis_url_file, monitor.workers)
    if as_json:
        print_json(found)
    else:
        print_workers(found)


def running(
    limit: LimitOption = 100,
    after: AfterOption = None,
    as_json: JsonOption = False,
    module: ModuleOption = None,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """List what runs, longest first: since when, which attempt, where, with which locks and arguments.

    Workers report every 5 s, and at most 200 tasks each. Secret arguments are shown as •••.

    Example: diracx-task-run running --limit 20
    """
    from ... import operations as monitor
    from ..runtime.registry import load_registry
    from .monitor_view import print_running

    registry = load_registry(module)
    page = ask(
        redis_url,
        redis_url_file,
        lambda redis: monitor.running(redis, limit, after, registry=registry),
    )
    if as_json:
        print_json(page)
    else:
        print_running(page)


tasks = typer.Typer(help="Look at classes of tasks.", no_args_is_help=True)


@tasks.command("stats")
def stats(
    window: Annotated[Window, typer.Option(help="Over the last hour, or the last day.")] = Window.HOUR,
    failures: Annotated[
        int, typer.Option(min=0, metavar="N", help="Show the last N failures as well, with their tracebacks.")
    ] = 0,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="NAME", help="Only this one: category:ClassName, or ClassName alone."),
    ] = None,
    as_json: JsonOption = False,
    module: ModuleOption = None,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """Show how each class of tasks did: done, failed, retried, dead, run time and time in the queue.

    Times are percentiles, at most 19 % too high. Time in the queue includes waiting for locks.

    Example: diracx-task-run tasks stats --window day --failures 3
    """
    from ... import operations as monitor
    from ...plumbing.task_names import resolve_task_name
    from ..runtime.registry import find_task, load_registry
    from .monitor_view import print_failures, print_stats

    async def look(redis: Redis) -> Any:
        counted = await monitor.stats(redis, window.value)
        name = None
        if task is not None:
            ended = [each.task_name for each in counted]
            name = resolve_task_name(task, ended + await monitor.failed_task_names(redis))
            # What has not ended lately may be installed all the same: then there is nothing to show.
            name = name or find_task(load_registry(module), task)
            counted = [each for each in counted if each.task_name == name]
        failed = await monitor.failures(redis, failures, task_name=name) if failures else monitor.Page(items=[])
        return counted, failed.items

    counted, failed = ask(redis_url, redis_url_file, look)
    if as_json:
        print_json({"stats": counted, "failures": failed})
        return
    print_stats(counted)
    print_failures(failed)
