"""`schedule`: inspect, run, pause and resume the schedules of periodic tasks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from difflib import get_close_matches
from typing import Annotated

import typer
from redis.asyncio import Redis

from ...operations.audited_actions import AlreadyQueuedError, AuditedActions
from ...operations.views import SCHEDULES
from ...plumbing.broker import RedisStreamBroker
from ...plumbing.broker.scheduling import has_leader
from ...plumbing.config import TasksConfig
from ...plumbing.exceptions import TaskArgumentsError
from ...plumbing.scheduler import ScheduleState, schedules
from ...plumbing.scheduler.admin import RunNow
from ...plumbing.scheduler.occurrences import iter_schedules
from ...plumbing.scheduler.overview import matching
from ...plumbing.submission.client import Binding
from ...plumbing.task_names import AmbiguousTaskNameError, resolve_task_name
from ..errors import CliError, UsageProblem, one_line, shortened
from ..options import JsonOption, command_group
from ..output import echo, echo_json, show
from ..runtime.configuration import Configuration, read_configuration
from ..runtime.server import ServerAndTasks

app = command_group(
    "schedule",
    "Inspect, run, pause and resume the schedules of periodic tasks.\n\n"
    "A schedule is called category:ClassName, then @INSTANCE where the operator has named several, then /VO where "
    "there is one for each.",
)

IdsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="ID...", help="Ids of schedules, or patterns: '*:SubmitPilots*/lhcb'."),
]
AllOption = Annotated[bool, typer.Option("--all", help="Every schedule.")]


@app.command("list")
def list_(*, ids: IdsArgument = None, as_json: JsonOption = False, server: ServerAndTasks) -> None:
    """List schedules: state, next and last run, how the last run ended, rule, and where the rule is set.

    Disabled schedules are listed as well. Times are in UTC.

    Example: diracx-task-run schedule list '*/lhcb' --json
    """
    config = _configuration(server, required=False)

    async def read(broker: RedisStreamBroker) -> tuple[list[ScheduleState], bool]:
        return await _states(broker.redis, server, config), await has_leader(broker.redis)

    states, led = server.run(read)
    if ids:
        wanted = set(_chosen(ids, False, states))
        states = [state for state in states if state.id in wanted]
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
    """Submit a schedule's task now, and print its id. The next run stays as it is; no scheduler is needed.

    Runs paused and disabled schedules, too. Exits with 1 when the last occurrence is still queued, and submits
    nothing.

    Example: diracx-task-run schedule run-now jobs:CleanSandboxStoreTask
    """
    config = _configuration(server, required=True)
    assert config is not None
    instances = {found.id: found for found in iter_schedules(server.registry, config.tasks, config.vos or ())}
    try:
        named = resolve_task_name(id_, instances)
    except AmbiguousTaskNameError as error:
        raise UsageProblem(str(error)) from error

    async def submit(broker: RedisStreamBroker) -> RunNow:
        if named is None:
            _chosen([id_], False, await _states(broker.redis, server, config))
            raise CliError(
                f"{id_} cannot be submitted here, where code and configuration do not know it; load its --module, "
                "or set DIRACX_CONFIG_BACKEND_URL and DIRACX_TASKS_CONFIG as for the scheduler"
            )
        binding = Binding(broker, server.registry, config.tasks)
        try:
            return RunNow(
                await AuditedActions.at_command_line(broker.redis).run_now(binding, instances[named]), True
            )
        except AlreadyQueuedError as error:
            return RunNow(error.task_id, False)
        except (TaskArgumentsError, TypeError, ValueError) as error:
            raise CliError(f"{id_} cannot be submitted: {error}") from error

    done = server.run(submit)
    if as_json:
        echo_json({"id": named, "task_id": done.task_id, "submitted": done.submitted})
    elif done.submitted:
        echo(done.task_id)
    if not done.submitted:
        raise CliError(
            f"{id_} was not submitted: its last occurrence, task {done.task_id}, still waits for a worker"
        )


@app.command("pause")
def pause(
    *, ids: IdsArgument = None, every: AllOption = False, as_json: JsonOption = False, server: ServerAndTasks
) -> None:
    """Submit no more occurrences of these schedules, until `schedule resume`. Submitted tasks go on.

    Example: diracx-task-run schedule pause '*/lhcb'
    """
    _switch(ids, every, lambda actions, chosen: actions.pause(chosen), "paused", as_json, server)


@app.command("resume")
def resume(
    *, ids: IdsArgument = None, every: AllOption = False, as_json: JsonOption = False, server: ServerAndTasks
) -> None:
    """Let paused schedules go on. A run missed meanwhile is made up for, once, unless it is `missed: skip`.

    Example: diracx-task-run schedule resume --all
    """
    _switch(ids, every, lambda actions, chosen: actions.resume(chosen), "resumed", as_json, server)


def _switch(
    ids: Sequence[str] | None,
    every: bool,
    switch: Callable[[AuditedActions, Sequence[str]], Awaitable[list[str]]],
    done: str,
    as_json: bool,
    server: ServerAndTasks,
) -> None:
    if bool(ids) == every:
        raise UsageProblem("name schedules by their ids or patterns, or give --all; `schedule list` shows them")
    config = _configuration(server, required=False)

    async def change(broker: RedisStreamBroker) -> tuple[list[str], list[str]]:
        chosen = _chosen(ids or (), every, await _states(broker.redis, server, config))
        return chosen, await switch(AuditedActions.at_command_line(broker.redis), chosen) if chosen else []

    chosen, changed = server.run(change)
    if as_json:
        echo_json([{"id": id_, "changed": id_ in changed} for id_ in chosen])
        return
    for id_ in chosen:
        echo(f"{one_line(id_)}  {done if id_ in changed else 'no change'}")
    if not chosen:
        echo("no schedules", err=True)


def _chosen(patterns: Sequence[str], every: bool, states: Sequence[ScheduleState]) -> list[str]:
    """The ids that match the patterns.

    Raises:
        UsageProblem: when a pattern matches none; suggests the nearest id.
    """
    known = [state.id for state in states]
    if every:
        return known
    try:
        found, unknown = matching(patterns, known)
    except AmbiguousTaskNameError as error:
        raise UsageProblem(str(error)) from error
    for pattern in unknown:
        names = {id_.partition(":")[2]: id_ for id_ in known} | {id_: id_ for id_ in known}
        near = get_close_matches(pattern, names, n=1, cutoff=0.5)
        hint = (
            f"; did you mean {names[near[0]]!r}?"
            if near
            else "; `diracx-task-run schedule list` shows what there is"
        )
        raise UsageProblem(f"no schedule {shortened(pattern, 120)}{hint}")
    return found


def _configuration(server: ServerAndTasks, *, required: bool) -> Configuration | None:
    """The configuration; where it is wrong and not required, a warning and None.

    Schedulers go on with the last good configuration, and an operator must be able to inspect and pause their
    schedules meanwhile: Redis has what they have planned.
    """
    registry = server.registry
    try:
        return read_configuration(registry)
    except CliError as error:
        if required:
            raise
        echo(
            f"{one_line(str(error))}; going on with what the scheduler has planned; "
            "`diracx-task-run config check` has every mistake",
            err=True,
        )
        return None


async def _states(redis: Redis, server: ServerAndTasks, config: Configuration | None) -> list[ScheduleState]:
    """All schedules; without a configuration, those that Redis knows."""
    if config is None:
        return await schedules(redis, {}, TasksConfig(), ())
    return await schedules(redis, server.registry, config.tasks, config.vos or ())
