"""`config`: check what operators write about tasks, and show what holds in the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CliError, UsageProblem, one_line
from ..options import JsonOption, ModuleOption
from ..output import echo, echo_json

if TYPE_CHECKING:
    from ...plumbing.config import Problem, Source, TasksConfig
    from ...plumbing.registry import TaskRegistry

app = typer.Typer(
    name="config",
    help="Settings of tasks: a YAML file, or the section Systems.Tasks of the DiracX configuration.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

FileArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[FILE]",
        help="YAML file; else that of DIRACX_TASKS_CONFIG, else Systems.Tasks at DIRACX_CONFIG_BACKEND_URL.",
    ),
]


@app.command()
def check(file: FileArgument = None, as_json: JsonOption = False, module: ModuleOption = None) -> None:
    """Check the settings, as a worker and a scheduler do at their start: every mistake with its line and path.

    Names that nothing goes by are mistakes here; at a start they are warnings. VOs are known where
    DIRACX_CONFIG_BACKEND_URL is set. Exits with 1 when there is a mistake.

    Example: diracx-task-run config check tasks.yaml
    """
    from ..runtime.registry import load_registry
    from .config_view import problem_record

    registry = load_registry(module)
    _, problems, source, vos = _read(file, registry)
    lines = source.report(problems)
    if as_json:
        found = [problem_record(problem, source) for problem in problems]
        echo_json({"source": source.name or None, "valid": not lines, "problems": found}, indent=2)
    if lines:
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        where = source.name or "the configuration of tasks"
        raise CliError(f"{where} has {count}", detail="".join(f"{line}\n" for line in lines))
    if not as_json:
        without = "" if vos is not None else "; VOs were not looked at, set DIRACX_CONFIG_BACKEND_URL"
        echo(f"{source.name} is valid{without}" if source.name else "nothing is configured: all is as in the code")


@app.command()
def show(
    file: FileArgument = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this task; category:ClassName, or the class alone.")
    ] = None,
    vo: Annotated[str | None, typer.Option(metavar="VO", help="As it holds for this VO.")] = None,
    as_json: JsonOption = False,
    module: ModuleOption = None,
) -> None:
    """Show the value of every setting of every task that holds in the end, and where it comes from.

    Without --vo: what holds for everybody, and then for each VO that has something of its own about the task.

    Example: diracx-task-run config show --task MySubmitPilotsTask --vo lhcb
    """
    from ...operations.settings import settings_records
    from ..runtime.registry import find_task, load_registry
    from .config_view import print_settings

    registry = load_registry(module)
    names = sorted(registry) if task is None else [find_task(registry, task)]
    config, problems, source, vos = _read(file, registry)
    fatal = [problem for problem in problems if not problem.foreign]
    if config is None or fatal:
        raise CliError(
            "the configuration of tasks is wrong; `diracx-task-run config check` says the same",
            detail="".join(f"{line}\n" for line in source.report(problems)),
        )
    if vo is not None and vos is not None and vo not in vos:
        raise UsageProblem(f"--vo {vo!r}: there is no such VO; there are {', '.join(vos) or 'none'}")
    for line in source.report(problems):
        echo(f"warning: {one_line(line)}", err=True)
    found = settings_records(config, registry, names, vo, limits=task is None)
    if as_json:
        echo_json({"source": source.name or None, "vos": vos, **found}, indent=2)
    else:
        print_settings(source, found["tasks"], found["limits"])


def _read(
    file: Path | None, registry: TaskRegistry
) -> tuple[TasksConfig | None, list[Problem], Source, list[str] | None]:
    """The settings, all that is wrong with them, where they were read, and the VOs where they are known.

    Raises:
        UsageProblem: when there is no such file.
        CliError: when the DiracX configuration cannot be read.
    """
    from ...plumbing.config import CONFIG_PATH_VARIABLE, Problem, Source, check_written
    from ...plumbing.exceptions import TaskConfigError
    from ..runtime.environment import CONFIG_VARIABLE, diracx_config

    if file is not None and not file.is_file():
        raise UsageProblem(f"{file}: there is no such file")
    config: Any = diracx_config()
    vos = None if config is None else sorted(config.registry)
    try:
        found, problems, source = check_written(registry, vos, path=file, config=config)
    except TaskConfigError as error:
        source = Source(str(file or os.environ.get(CONFIG_PATH_VARIABLE)))
        return None, [Problem((), str(error).removeprefix(f"{source.name}: "))], source, vos
    if not (file or os.environ.get(CONFIG_PATH_VARIABLE) or os.environ.get(CONFIG_VARIABLE)):
        source = Source()
    return found, problems, source, vos
