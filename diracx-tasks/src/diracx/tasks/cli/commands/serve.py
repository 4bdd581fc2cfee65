"""`worker` and `scheduler`: the service processes."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections import Counter
from typing import Annotated

import typer
from prometheus_client import Metric

from ...operations.collectors import open_collectors
from ...operations.health import health_checks
from ...operations.metrics import scheduler_metrics, worker_metrics
from ...plumbing._util.passwords import mask
from ...plumbing.base_task import PeriodicVoAwareBaseTask
from ...plumbing.broker.labels import LONGEST_TTL_SECONDS
from ...plumbing.broker.server_check import Role
from ...plumbing.broker.sizes import MAX_BYTES
from ...plumbing.broker.telemetry import is_collected
from ...plumbing.enums import Size
from ...plumbing.persistence.resubmission import Resubmitter
from ...plumbing.scheduler import TaskScheduler
from ...plumbing.worker import Worker
from ...plumbing.worker.settings import LONGEST_LEASE_SECONDS, WorkerSettings
from ..errors import CliError, one_line
from ..runtime.configuration import CONFIG_VARIABLE
from ..runtime.databases import NO_TASK_DB, check_databases, open_database, open_task_db, unchecked_task_db
from ..runtime.logs import set_up_logging, set_up_telemetry
from ..runtime.service import Service, ServiceOptions
from ..runtime.supervisor import Child, ChildFailedError, Supervisor, is_supervised

logger = logging.getLogger(__package__)


def worker(
    *,
    worker_size: Annotated[Size, typer.Option(help="Size of the tasks to run.")] = Size.MEDIUM,
    max_concurrent_tasks: Annotated[int, typer.Option(min=1, help="Maximum number of concurrent tasks.")] = 10,
    lease_seconds: Annotated[
        float,
        typer.Option(
            min=0.1,
            max=LONGEST_LEASE_SECONDS,
            help="Time without heartbeat after which other workers reclaim its tasks.",
        ),
    ] = 30.0,
    max_deliveries: Annotated[
        int, typer.Option(min=1, help="Store a task as a dead letter after this many of its workers crashed.")
    ] = 3,
    grace: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Time that running tasks have after SIGTERM.")
    ] = 30.0,
    hard_limit: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            metavar="SECONDS",
            help="End the process with exit code 70 if a task ignores its cancellation this long.",
        ),
    ] = None,
    result_ttl: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=LONGEST_TTL_SECONDS,
            metavar="SECONDS",
            help="Store the results of all tasks for this time.",
        ),
    ] = None,
    max_result_bytes: Annotated[
        int,
        typer.Option(min=100_000, metavar="BYTES", help="Store only the size of results that are larger."),
    ] = MAX_BYTES,
    processes: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Run N processes, such as one per core; restart those that crash."),
    ] = 1,
    options: ServiceOptions,
) -> None:
    """Run tasks of one size until SIGTERM or Ctrl-C; a second signal cancels running tasks.

    Databases: DIRACX_DB_URL_<NAME>; dead letters: DIRACX_DB_URL_TASKDB.

    Configuration: DIRACX_CONFIG_BACKEND_URL. Settings of tasks: its Systems.Tasks, or the file
    DIRACX_TASKS_CONFIG.

    Example: diracx-task-run worker --worker-size small --max-concurrent-tasks 50
    """
    set_up_logging(options.log_level)
    if processes > 1 and not is_supervised():
        raise typer.Exit(asyncio.run(_supervise(sys.argv[1:], processes)))
    settings = WorkerSettings(
        max_concurrent_tasks=max_concurrent_tasks,
        lease_seconds=lease_seconds,
        max_deliveries=max_deliveries,
        grace_seconds=grace,
        hard_limit_seconds=hard_limit,
        result_ttl_seconds=result_ttl,
        max_result_bytes=max_result_bytes,
    )
    service = Service(options)
    set_up_telemetry("tasks-worker")

    async def serve() -> None:
        broker, config = await service.open(Role.WORKER, worker_size)
        registry = options.registry
        task_db = await service.enter(open_task_db())
        try:
            serving = Worker(broker, registry, settings=settings, task_db=task_db, config=config.tasks)
            await check_databases(serving.plans)
        except (TypeError, NameError) as error:
            raise CliError(f"a task class cannot be executed: {error}") from error
        service.on_second_signal = serving.cancel_running

        async def collect() -> list[Metric]:
            size, slots = str(worker_size), max_concurrent_tasks
            return worker_metrics(serving.reporter, broker.counts, size, slots, registry)

        await service.serve(
            serving,
            broker,
            config,
            role=f"worker {worker_size}",
            line=f"{worker_size} tasks, {max_concurrent_tasks} at a time, from {mask(service.url)}",
            collect=collect,
            reconfigure=lambda tasks, _: serving.reconfigure(tasks),
        )

    service.run(serve)


async def _supervise(arguments: list[str], processes: int) -> int:
    """Run this command in several processes. Returns the exit code."""
    children = [Child(f"process {number}", arguments, number) for number in range(1, processes + 1)]
    supervisor = Supervisor([children], logger.warning)
    supervisor.handle_signals(signal.SIGINT, signal.SIGTERM)
    try:
        return await supervisor.run()
    except ChildFailedError as error:
        return error.exit_code
    finally:
        logger.info("stopped: all %d processes have ended", processes)


def scheduler(
    *,
    resubmit_dead_letters: Annotated[
        bool,
        typer.Option(
            "--resubmit-dead-letters",
            help="Submit the open dead letters again at the start, except poison tasks.",
        ),
    ] = False,
    options: ServiceOptions,
) -> None:
    """Submit periodic tasks when they are due, until SIGTERM or Ctrl-C. Any number may run; one leads.

    The VOs are those of the DiracX configuration (DIRACX_CONFIG_BACKEND_URL).

    Example: diracx-task-run scheduler --redis-url redis://localhost
    """
    set_up_logging(options.log_level)
    service = Service(options)
    set_up_telemetry("tasks-scheduler")

    async def serve() -> None:
        task_db = None
        if resubmit_dead_letters:
            task_db = await service.enter(open_database("TaskDB", NO_TASK_DB))
        broker, config = await service.open(Role.SCHEDULER)
        registry = options.registry
        if config.vos is None:
            for_each_vo = [name for name, cls in registry.items() if issubclass(cls, PeriodicVoAwareBaseTask)]
            if for_each_vo:
                logger.warning(
                    "no VOs are known, so these are not scheduled: %s; set %s",
                    ", ".join(for_each_vo),
                    CONFIG_VARIABLE,
                )
        serving = TaskScheduler(broker, registry, config=config.tasks, vos=config.vos or ())
        if task_db is not None:
            resubmitter = Resubmitter(task_db, broker, registry, config.tasks)
            service.run_meanwhile(_resubmit(resubmitter))  # an interrupted resubmission can be repeated
        if options.metrics_port is not None or is_collected():  # else `collect` is not called
            database = await service.enter(unchecked_task_db())
            collectors = await service.enter(open_collectors(database))
            checks = await service.enter(health_checks(broker.redis, database))
        alerts: list[str] = []  # of the last collection

        async def collect() -> list[Metric]:
            if not serving.leads.is_set():
                alerts.clear()
                return scheduler_metrics(None, broker.counts)
            health = await checks.run()
            alerts[:] = health.names()
            return scheduler_metrics(health, broker.counts) + await collectors.metrics()

        await service.serve(
            serving,
            broker,
            config,
            role="scheduler",
            line=f"schedules on {mask(service.url)}",
            collect=collect,
            reconfigure=lambda tasks, vos: serving.reconfigure(tasks, vos or ()),
            alerts=lambda: alerts,
        )

    service.run(serve)


async def _resubmit(resubmitter: Resubmitter) -> None:
    """Submit dead letters again in the background; log errors, so that the scheduler continues."""
    statuses: Counter[str] = Counter()
    try:
        async for results in resubmitter.resubmit_automatic():
            statuses.update(str(result.status) for result in results)
            for result in results:
                if result.why:
                    logger.warning("dead letter %d is refused: %s", result.dead_letter["id"], one_line(result.why))
    except Exception as error:
        logger.error("dead letters are not submitted again until the next start: %s", one_line(str(error)))
    logger.info("dead letters: %d submitted again, %d refused", statuses["resubmitted"], statuses["refused"])
