"""`schedule`: look at the schedules of periodic tasks; run, pause and resume them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from ..errors import CliError, UsageProblem, explained_redis, one_line, shortened
from ..options import JsonOption, ModuleOption, RedisUrlFileOption, RedisUrlOption, resolve_redis_url
from ..output import echo, echo_json

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from ...operations.audited_actions import Deeds
    from ...plumbing.broker import RedisStreamBroker
    from ...plumbing.registry import TaskRegistry
    from ...plumbing.scheduler import ScheduleState
    from ...plumbing.scheduler.by_hand import RunNow
    from ..runtime.environment import Configuration

_Answer = TypeVar("_Answer")

app = typer.Typer(
    help="Look at the schedules of periodic tasks; run, pause and resume them.\n\n"
    "A schedule is called category:ClassName, then @INSTANCE where the operator has named several, then /VO where "
    "there is one for each.",
    no_args_is_help=True,
)

IdsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="ID...", help="Ids of schedules, or patterns: '*:SubmitPilots*/lhcb'."),
]
AllOption = Annotated[bool, typer.Option("--all", help="Every schedule.")]


@app.command("list")
def list_(
    ids: IdsArgument = None,
    as_json: JsonOption = False,
    module: ModuleOption = None,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """List schedules: state, next and last run, how the last one ended, rule, and who says so.

    Those that are switched off are listed as well. Times are in UTC.

    Example: diracx-task-run schedule list '*/lhcb' --json
    """
    from ...plumbing.scheduler.overview import somebody_leads
    from .schedule_view import print_table, record

    session = _Session(module, redis_url, redis_url_file, only_redis_will_do=True)

    async def look(broker: RedisStreamBroker) -> tuple[list[ScheduleState], bool]:
        return await session.states(broker.redis), await somebody_leads(broker.redis)

    states, led = session.ask(look)
    if ids:
        wanted = set(_chosen(ids, False, states))
        states = [state for state in states if state.id in wanted]
    if as_json:
        echo_json([record(state) for state in states], indent=2)
    else:
        print_table(states)
    if not led:
        echo("no scheduler leads: nothing is submitted", err=True)


@app.command("run-now")
def run_now(
    id_: Annotated[str, typer.Argument(metavar="ID", help="Id of a schedule.")],
    as_json: JsonOption = False,
    module: ModuleOption = None,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """Submit a schedule's task now, and print its id. The next run stays as it is; no scheduler is needed.

    Paused and disabled ones run, too. Exits with 1 when the last occurrence still waits, and submits nothing.

    Example: diracx-task-run schedule run-now jobs:CleanSandboxStoreTask
    """
    from ...operations.audited_actions import Deeds, StillWaitingError
    from ...plumbing.exceptions import TaskArgumentsError
    from ...plumbing.scheduler.by_hand import RunNow
    from ...plumbing.scheduler.occurrences import every_instance
    from ...plumbing.submission.client import Binding
    from ...plumbing.task_names import AmbiguousTaskNameError, resolve_task_name

    session = _Session(module, redis_url, redis_url_file)
    config = session.config
    assert config is not None
    instances = {found.id: found for found in every_instance(session.registry, config.tasks, config.vos or ())}
    try:
        named = resolve_task_name(id_, instances)
    except AmbiguousTaskNameError as error:
        raise UsageProblem(str(error)) from error

    async def submit(broker: RedisStreamBroker) -> RunNow:
        if named is None:
            _chosen([id_], False, await session.states(broker.redis))
            raise CliError(
                f"{id_} cannot be submitted here, where code and configuration do not know it; load its --module, "
                "or set DIRACX_CONFIG_BACKEND_URL and DIRACX_TASKS_CONFIG as for the scheduler"
            )
        binding = Binding(broker, session.registry, config.tasks)
        try:
            return RunNow(await Deeds.at_command_line(broker.redis).run_now(binding, instances[named]), True)
        except StillWaitingError as error:
            return RunNow(error.task_id, False)
        except (TaskArgumentsError, TypeError, ValueError) as error:
            raise CliError(f"{id_} cannot be submitted: {error}") from error

    done = session.ask(submit)
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
    ids: IdsArgument = None,
    every: AllOption = False,
    as_json: JsonOption = False,
    module: ModuleOption = None,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """Submit no more occurrences of these schedules, until `schedule resume`. What has been submitted goes on.

    Example: diracx-task-run schedule pause '*/lhcb'
    """

    def switch(deeds: Deeds, chosen: Sequence[str]) -> Awaitable[list[str]]:
        return deeds.pause(chosen)

    _switch(ids, every, switch, "paused", as_json, _Session(module, redis_url, redis_url_file, True))


@app.command("resume")
def resume(
    ids: IdsArgument = None,
    every: AllOption = False,
    as_json: JsonOption = False,
    module: ModuleOption = None,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """Let paused schedules go on. A run missed meanwhile is made up for, once, unless it is `missed: skip`.

    Example: diracx-task-run schedule resume --all
    """

    def switch(deeds: Deeds, chosen: Sequence[str]) -> Awaitable[list[str]]:
        return deeds.resume(chosen)

    _switch(ids, every, switch, "resumed", as_json, _Session(module, redis_url, redis_url_file, True))


def _switch(
    ids: Sequence[str] | None,
    every: bool,
    switch: Callable[[Deeds, Sequence[str]], Awaitable[list[str]]],
    done: str,
    as_json: bool,
    session: _Session,
) -> None:
    if bool(ids) == every:
        raise UsageProblem("name schedules by their ids or patterns, or give --all; `schedule list` shows them")

    async def go(broker: RedisStreamBroker) -> tuple[list[str], list[str]]:
        from ...operations.audited_actions import Deeds

        chosen = _chosen(ids or (), every, await session.states(broker.redis))
        return chosen, await switch(Deeds.at_command_line(broker.redis), chosen) if chosen else []

    chosen, changed = session.ask(go)
    if as_json:
        echo_json([{"id": id_, "changed": id_ in changed} for id_ in chosen])
        return
    for id_ in chosen:
        echo(f"{one_line(id_)}  {done if id_ in changed else 'no change'}")
    if not chosen:
        echo("no schedules", err=True)


def _chosen(patterns: Sequence[str], every: bool, states: Sequence[ScheduleState]) -> list[str]:
    """The ids that are meant.

    Raises:
        UsageProblem: when a pattern stands for none; suggests the nearest id.
    """
    from difflib import get_close_matches

    from ...plumbing.scheduler.overview import matching
    from ...plumbing.task_names import AmbiguousTaskNameError

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


class _Session:
    """What every one of these commands needs: the server, the tasks, what the operator has written.

    Args:
        only_redis_will_do: while what is written is wrong, go on with what schedulers have left in Redis: they
            run by the last good configuration, and whoever mends must be able to look and to pause.
    """

    def __init__(
        self,
        module: list[str] | None,
        redis_url: str | None,
        redis_url_file: str | None,
        only_redis_will_do: bool = False,
    ) -> None:
        from ..runtime.environment import read_configuration
        from ..runtime.registry import load_registry

        self._url = resolve_redis_url(redis_url, redis_url_file)
        self.registry: TaskRegistry = load_registry(module)
        self.config: Configuration | None = None
        try:
            self.config = read_configuration(self.registry)
        except CliError as error:
            if not only_redis_will_do:
                raise
            echo(
                f"{one_line(str(error))}; going on with what the scheduler has planned; "
                "`diracx-task-run config check` has every mistake",
                err=True,
            )

    async def states(self, redis: Redis) -> list[ScheduleState]:
        """All schedules."""
        from ...plumbing.config import TasksConfig
        from ...plumbing.scheduler import schedules

        if self.config is None:
            return await schedules(redis, {}, TasksConfig(), ())
        return await schedules(redis, self.registry, self.config.tasks, self.config.vos or ())

    def ask(self, question: Callable[[RedisStreamBroker], Awaitable[_Answer]]) -> _Answer:
        """The answer to a question that needs the server."""
        from ..runtime.broker import open_broker

        async def ask() -> _Answer:
            async with open_broker(self._url) as broker:
                with explained_redis(self._url):
                    return await question(broker)

        return asyncio.run(ask())
