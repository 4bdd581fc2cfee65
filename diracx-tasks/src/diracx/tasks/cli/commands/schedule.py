"""`schedule`: inspect, run, pause and resume the schedules of periodic tasks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated

import typer

from ...operations.audited_actions import AuditedActions
from ...operations.views import SCHEDULES
from ...plumbing.broker import RedisStreamBroker
from ...plumbing.broker.scheduling import has_leader
from ...plumbing.config import TasksConfig
from ...plumbing.exceptions import TaskArgumentsError
from ...plumbing.registry import TaskRegistry
from ...plumbing.scheduler import ScheduleState, schedules
from ...plumbing.scheduler.admin import AlreadyQueuedError
from ...plumbing.scheduler.occurrences import iter_schedules
from ...plumbing.scheduler.overview import matching
from ...plumbing.submission.client import Binding
from ...plumbing.task_names import resolve_task_name
from ..errors import CliError, UsageProblem, one_line, shortened
from ..options import JsonOption, command_group
from ..output import echo, echo_json, report, show
from ..runtime.configuration import read_configuration
from ..runtime.registry import nearest
from ..runtime.server import ServerAndTasks

app = command_group(
    "schedule",
    "Inspect, run, pause and resume the schedules of periodic tasks.\n\n"
    "The id of a schedule is category:ClassName, with @INSTANCE if several are configured, and /VO if there is "
    "one per VO.",
)

IdsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="ID...", help="Ids of schedules, or patterns: '*:SubmitPilots*/lhcb'."),
]
AllOption = Annotated[bool, typer.Option("--all", help="Every schedule.")]


@app.command("list")
def list_(*, ids: IdsArgument = None, as_json: JsonOption = False, server: ServerAndTasks) -> None:
    """List schedules: state, next and last run, last outcome, rule, and where the rule is set.

    Disabled schedules are listed, too. Times are in UTC.

    Example: diracx-task-run schedule list '*/lhcb' --json
    """
    configured = _configured(server)

    async def read(broker: RedisStreamBroker) -> tuple[list[ScheduleState], bool]:
        return await schedules(broker.redis, *configured), await has_leader(broker.redis)

    states, led = server.run(read)
    if ids:
        chosen = set(_chosen(ids, states))
        states = [state for state in states if state.id in chosen]
    show(SCHEDULES, states, as_json)
    if not led:
        echo("no scheduler leads: nothing is submitted", err=True)


@app.command("run-now")
def run_now(
    *,
    id_: Annotated[str, typer.Argument(metavar="ID", help="Id of a schedule.")],
    as_json: JsonOption = False,
    server: ServerAndTasks,
) -> None:
    """Submit a schedule's task now, and print its id. Does not change the next run, and needs no scheduler.

    Works for paused and disabled schedules, too. Exits with 1 and submits nothing if the last occurrence is still
    queued.

    Example: diracx-task-run schedule run-now jobs:CleanSandboxStoreTask
    """
    config = read_configuration(server.registry)
    configured = server.registry, config.tasks, config.vos or ()
    instances = {found.id: found for found in iter_schedules(*configured)}
    named = resolve_task_name(id_, instances)

    async def submit(broker: RedisStreamBroker) -> str:
        if named is None:
            _chosen([id_], await schedules(broker.redis, *configured))
            raise CliError(
                f"{id_} cannot be submitted: it is in neither code nor configuration of this process; load its "
                "--module, or set DIRACX_CONFIG_BACKEND_URL and DIRACX_TASKS_CONFIG as for the scheduler"
            )
        binding = Binding(broker, server.registry, config.tasks)
        try:
            return await AuditedActions.for_command_line(broker.redis).run_now(binding, instances[named])
        except (TaskArgumentsError, TypeError, ValueError) as error:
            raise CliError(f"{id_} cannot be submitted: {error}") from error

    try:
        task_id = server.run(submit)
    except AlreadyQueuedError as error:
        if as_json:
            echo_json({"id": named, "task_id": error.task_id, "submitted": False})
        raise CliError(
            f"{id_} was not submitted: its last occurrence, task {error.task_id}, still waits for a worker"
        ) from error
    report({"id": named, "task_id": task_id, "submitted": True}, [task_id], as_json)


@app.command("pause")
def pause(
    *, ids: IdsArgument = None, every: AllOption = False, as_json: JsonOption = False, server: ServerAndTasks
) -> None:
    """Pause schedules: no occurrences are submitted until `schedule resume`. Submitted tasks continue.

    Example: diracx-task-run schedule pause '*/lhcb'
    """
    _switch(ids, every, AuditedActions.pause, "paused", as_json, server)


@app.command("resume")
def resume(
    *, ids: IdsArgument = None, every: AllOption = False, as_json: JsonOption = False, server: ServerAndTasks
) -> None:
    """Resume paused schedules. A run that was missed meanwhile is submitted once, unless `missed: skip` is set.

    Example: diracx-task-run schedule resume --all
    """
    _switch(ids, every, AuditedActions.resume, "resumed", as_json, server)


def _switch(
    ids: Sequence[str] | None,
    every: bool,
    switch: Callable[[AuditedActions, Sequence[str]], Awaitable[list[str]]],
    done: str,
    as_json: bool,
    server: ServerAndTasks,
) -> None:
    if bool(ids) == every:
        raise UsageProblem("give ids or patterns of schedules, or --all; see `diracx-task-run schedule list`")
    configured = _configured(server)

    async def change(broker: RedisStreamBroker) -> tuple[list[str], set[str]]:
        states = await schedules(broker.redis, *configured)
        chosen = _chosen(ids, states) if ids else [state.id for state in states]
        return chosen, set(await switch(AuditedActions.for_command_line(broker.redis), chosen) if chosen else ())

    chosen, changed = server.run(change)
    records = [{"id": id_, "changed": id_ in changed} for id_ in chosen]
    report(records, (f"{one_line(id_)}  {done if id_ in changed else 'no change'}" for id_ in chosen), as_json)
    if not chosen and not as_json:
        echo("no schedules", err=True)


def _chosen(patterns: Sequence[str], states: Sequence[ScheduleState]) -> list[str]:
    """Return the ids that match the patterns."""
    known = [state.id for state in states]
    found, unknown = matching(patterns, known)
    for pattern in unknown:
        near = nearest(pattern, known)
        hint = f"; did you mean {near[0]!r}?" if near else "; see `diracx-task-run schedule list`"
        raise UsageProblem(f"no schedule {shortened(pattern, 120)}{hint}")
    return found


def _configured(server: ServerAndTasks) -> tuple[TaskRegistry, TasksConfig, tuple[str, ...]]:
    """Return tasks, their settings and the VOs; if the configuration is wrong, nothing after a warning.

    Schedulers keep the last valid configuration, and operators must be able to inspect and pause the schedules
    that those have planned in Redis.
    """
    registry = server.registry
    try:
        config = read_configuration(registry)
    except CliError as error:
        echo(
            f"{one_line(str(error))}; using the schedules that the scheduler has planned; "
            "`diracx-task-run config check` lists every mistake",
            err=True,
        )
        return TaskRegistry(), TasksConfig(), ()
    return registry, config.tasks, config.vos or ()
