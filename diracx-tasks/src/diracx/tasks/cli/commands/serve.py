"""`worker` and `scheduler`: the two processes that an installation runs."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...plumbing._util.tasks import end
from ...plumbing.broker.sizes import MAX_BYTES
from ...plumbing.enums import Size
from ..errors import CliError, explained_redis, mask, one_line
from ..options import (
    LogLevelOption,
    ModuleOption,
    RedisUrlFileOption,
    RedisUrlOption,
    resolve_redis_url,
)
from ..runtime.metrics_server import (
    LOOPBACK,
    MetricsHostOption,
    MetricsPortOption,
    open_collectors,
    serve_metrics,
    set_up_telemetry,
)
from ..runtime.supervisor import Supervisor, is_supervised, serve_supervised

if TYPE_CHECKING:
    from prometheus_client import Metric

    from ...plumbing.config import TasksConfig
    from ...plumbing.persistence.resubmission import Resubmitter

logger = logging.getLogger(__package__)

#: New objects before the garbage collector looks for cycles: a worker makes thousands a second that have none.
_COLLECTED_AFTER = 10_000


def worker(
    worker_size: Annotated[Size, typer.Option(help="Size of the tasks it takes.")] = Size.MEDIUM,
    max_concurrent_tasks: Annotated[int, typer.Option(min=1, help="How many tasks run at a time.")] = 10,
    lease_seconds: Annotated[
        float, typer.Option(min=0.1, help="Silent for so long, it counts as dead and others take over.")
    ] = 30.0,
    max_deliveries: Annotated[
        int, typer.Option(min=1, help="A task that killed so many workers is a dead letter.")
    ] = 3,
    grace: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long running tasks may go on after SIGTERM.")
    ] = 30.0,
    hard_limit: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            metavar="SECONDS",
            help="A task that ignores its cancellation for so long ends the process with exit code 70.",
        ),
    ] = None,
    result_ttl: Annotated[
        int | None,
        typer.Option(min=1, metavar="SECONDS", help="Keep all results so long, not only those asked for."),
    ] = None,
    max_result_bytes: Annotated[
        int,
        typer.Option(min=100_000, metavar="BYTES", help="Of a larger result, only that is kept that it was."),
    ] = MAX_BYTES,
    processes: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Run N such workers, and start again what dies: one for each core."),
    ] = 1,
    metrics_port: MetricsPortOption = None,
    metrics_host: MetricsHostOption = LOOPBACK,
    module: ModuleOption = None,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
    log_level: LogLevelOption = None,
) -> None:
    """Run tasks of one size until SIGTERM or Ctrl-C; a second one cancels what still runs.

    Databases: DIRACX_DB_URL_<NAME>; that of the dead letters is DIRACX_DB_URL_TASKDB.

    Configuration: DIRACX_CONFIG_BACKEND_URL. Settings of tasks: its Systems.Tasks, or a file DIRACX_TASKS_CONFIG.

    Example: diracx-task-run worker --worker-size small --max-concurrent-tasks 50
    """
    from ...plumbing.worker.settings import WorkerSettings
    from ..runtime.logs import set_task_log_level, set_up_logging

    set_up_logging(log_level)
    if processes > 1 and not is_supervised():
        raise typer.Exit(asyncio.run(Supervisor(sys.argv[1:], processes).run()))
    settings = WorkerSettings(
        max_concurrent_tasks=max_concurrent_tasks,
        lease_seconds=lease_seconds,
        max_deliveries=max_deliveries,
        grace_seconds=grace,
        hard_limit_seconds=hard_limit,
        result_ttl_seconds=result_ttl,
        max_result_bytes=max_result_bytes,
    )
    url = resolve_redis_url(redis_url, redis_url_file)

    set_up_telemetry("tasks-worker")

    async def run(stop: asyncio.Event, on_second_signal: list[Callable[[], None]]) -> None:
        from ...plumbing.broker.server_check import Role
        from ...plumbing.worker import Worker
        from ..runtime.broker import open_broker
        from ..runtime.environment import check_databases, following, open_task_db, read_configuration
        from ..runtime.registry import load_registry, warn_of_ambiguous_names

        async with open_broker(url, worker_size, role=Role.WORKER) as broker:
            registry = load_registry(module)
            set_task_log_level(registry)
            warn_of_ambiguous_names(registry)
            config = read_configuration(registry)
            async with open_task_db() as task_db:
                try:
                    serving = Worker(broker, registry, settings=settings, task_db=task_db, config=config.tasks)
                    await check_databases(serving.plans)
                except (TypeError, NameError) as error:
                    raise CliError(f"a task cannot be run by any worker: {error}") from error
                on_second_signal.append(serving.cancel_running)
                where = f"{worker_size} tasks, {max_concurrent_tasks} at a time, from {mask(url)}"
                aside = [asyncio.create_task(_announce(serving.ready, f"ready: {where}"))]
                if is_supervised():
                    aside.append(asyncio.create_task(serve_supervised(serving.ready, stop.set)))
                role = f"worker {worker_size}"

                async def counted() -> list[Metric]:
                    from ...operations.metrics import worker_metrics

                    size, slots = str(worker_size), max_concurrent_tasks
                    return worker_metrics(serving.reporter, broker.counts, size, slots, registry)

                def is_ready() -> bool:
                    return serving.ready.is_set() and not stop.is_set()

                try:
                    async with (
                        serve_metrics(metrics_host, metrics_port, is_ready, counted, serving.reporter),
                        following(config, registry, broker, role, lambda tasks, _: serving.reconfigure(tasks)),
                    ):
                        with explained_redis(url):
                            await serving.run(stop)
                finally:
                    for task in aside:
                        task.cancel()

    _serve(run)


def scheduler(
    resubmit_dead_letters: Annotated[
        bool,
        typer.Option(
            "--resubmit-dead-letters",
            help="At the start, submit all open dead letters again that can be, but for poison.",
        ),
    ] = False,
    metrics_port: MetricsPortOption = None,
    metrics_host: MetricsHostOption = LOOPBACK,
    module: ModuleOption = None,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
    log_level: LogLevelOption = None,
) -> None:
    """Submit periodic tasks when they are due, until SIGTERM or Ctrl-C. Any number may run; one leads.

    The VOs are those of the DiracX configuration (DIRACX_CONFIG_BACKEND_URL).

    Example: diracx-task-run scheduler --redis-url redis://localhost
    """
    from ..runtime.logs import set_task_log_level, set_up_logging

    set_up_logging(log_level)
    url = resolve_redis_url(redis_url, redis_url_file)

    set_up_telemetry("tasks-scheduler")

    async def run(stop: asyncio.Event, _: list[Callable[[], None]]) -> None:
        from ...plumbing.base_task import PeriodicVoAwareBaseTask
        from ...plumbing.broker.server_check import Role
        from ...plumbing.persistence.resubmission import Resubmitter
        from ...plumbing.scheduler import TaskScheduler
        from ..runtime.broker import open_broker
        from ..runtime.environment import CONFIG_VARIABLE, following, read_configuration, required_task_db
        from ..runtime.registry import load_registry, warn_of_ambiguous_names

        async with AsyncExitStack() as stack:
            broker = await stack.enter_async_context(open_broker(url, role=Role.SCHEDULER))
            task_db = await stack.enter_async_context(required_task_db()) if resubmit_dead_letters else None
            registry = load_registry(module)
            set_task_log_level(registry)
            warn_of_ambiguous_names(registry)
            config = read_configuration(registry)
            if config.vos is None:
                aware = [name for name, cls in registry.items() if issubclass(cls, PeriodicVoAwareBaseTask)]
                if aware:
                    logger.warning(
                        "no VOs are known, so these are not scheduled: %s; set %s",
                        ", ".join(aware),
                        CONFIG_VARIABLE,
                    )
            serving = TaskScheduler(broker, registry, config=config.tasks, vos=config.vos or ())
            if task_db is not None:
                resubmitter = Resubmitter(task_db, broker, registry, config.tasks)
                resubmitting = asyncio.create_task(_resubmit(resubmitter))
                stack.push_async_callback(end, resubmitting)  # wherever it is: what broke off can be repeated

            def follow(tasks: TasksConfig, vos: tuple[str, ...] | None) -> None:
                serving.reconfigure(tasks, vos or ())

            collect, check_health = await stack.enter_async_context(open_collectors(metrics_port, broker.redis))

            alerts: list[str] = []  # as of the last collection of metrics

            async def counted() -> list[Metric]:
                from ...operations.metrics import scheduler_metrics

                health = await check_health() if serving.leads.is_set() else None
                alerts[:] = [] if health is None else health.names()
                collected = await collect() if health is not None else []
                return scheduler_metrics(health, broker.counts) + collected

            def is_ready() -> bool:
                return serving.ready.is_set() and not stop.is_set()

            await stack.enter_async_context(
                serve_metrics(metrics_host, metrics_port, is_ready, counted, alerts=lambda: alerts)
            )
            await stack.enter_async_context(following(config, registry, broker, "scheduler", follow))
            logger.info("ready: schedules on %s", mask(url))
            with explained_redis(url):
                await serving.run(stop)

    _serve(run)


async def _resubmit(resubmitter: Resubmitter) -> None:
    """Submit dead letters again beside the scheduler's own work, which no failure of this may end."""
    from collections import Counter

    fates: Counter[str] = Counter()
    try:
        async for verdicts in resubmitter.all_by_itself():
            fates.update(str(verdict.fate) for verdict in verdicts)
            for verdict in verdicts:
                if verdict.why:
                    logger.warning("dead letter %d is left: %s", verdict.letter["id"], one_line(verdict.why))
    except Exception as error:
        logger.error("dead letters are not submitted again: %s; the next start will", one_line(str(error)))
    logger.info("dead letters: %d submitted again, %d left", fates["resubmitted"], fates["refused"])


async def _announce(event: asyncio.Event, line: str) -> None:
    await event.wait()
    gc.freeze()  # modules and all that was made up to here stay: the collector need not look through them again
    gc.set_threshold(_COLLECTED_AFTER)
    logger.info("%s", line)


def _serve(run: Callable[[asyncio.Event, list[Callable[[], None]]], Awaitable[None]]) -> None:
    """Run until a signal comes, and end as it should. What goes wrong at the start is one line."""

    async def until_signalled() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        on_second_signal: list[Callable[[], None]] = []

        def stop_or_hurry(number: int) -> None:
            name = signal.Signals(number).name
            if not stop.is_set():
                logger.info("%s: stopping; once more to cancel what runs", name)
                stop.set()
                return
            logger.warning("%s again: cancelling what runs", name)
            for action in on_second_signal:
                action()

        def heard(number: int, _: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(stop_or_hurry, number)

        # Not through the loop: its handlers go with it, and a late signal would then kill a process that has
        # done all its work and only takes leave, with an exit code of failure.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, heard)
        await run(stop, on_second_signal)
        logger.info("stopped")

    with asyncio.Runner(loop_factory=_fastest_loop()) as runner:
        _run_to_its_end(runner.get_loop(), until_signalled())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # Python's own end would give up the handlers above


def _run_to_its_end(loop: asyncio.AbstractEventLoop, main: Coroutine[Any, Any, None]) -> None:
    """Run the loop until this has ended: an event loop stops for a KeyboardInterrupt or SystemExit of anything
    that runs in it, as of an asyncio task that a task of ours has started. Signals come in another way.
    """
    running = loop.create_task(main)
    while True:
        try:
            return loop.run_until_complete(running)
        except (KeyboardInterrupt, SystemExit) as error:
            if running.done():
                raise
            logger.error(
                "a part of a task raised %s outside of `execute`; the worker goes on", type(error).__name__
            )


def _fastest_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed (`pip install diracx-tasks[fast]`); None for that of asyncio."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
