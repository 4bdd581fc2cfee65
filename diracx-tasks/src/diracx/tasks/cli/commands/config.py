"""`config`: check the settings of tasks, show the resolved ones, and which process runs with which."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ...operations.settings import settings_records
from ...operations.views import ACTIVE_CONFIGS, SETTINGS
from ...plumbing.config import CONFIG_PATH_VARIABLE, Problem, Source, TasksConfig, check_written
from ...plumbing.config.active import ActiveConfig, active_configs
from ...plumbing.exceptions import TaskConfigError
from ...plumbing.registry import TaskRegistry
from ..errors import CliError, UsageProblem, one_line
from ..options import JsonOption, ModuleOption, command_group
from ..output import console, echo, echo_json, print_json, show, styled
from ..runtime.configuration import CONFIG_VARIABLE, diracx_config
from ..runtime.registry import find_task, load_registry
from ..runtime.server import Server

app = command_group(
    "config", "Settings of tasks: a YAML file, or the section Systems.Tasks of the DiracX configuration."
)

FileArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[FILE]",
        help="YAML file; else that of DIRACX_TASKS_CONFIG, else Systems.Tasks at DIRACX_CONFIG_BACKEND_URL.",
    ),
]


@app.command("check")
def check(file: FileArgument = None, as_json: JsonOption = False, module: ModuleOption = None) -> None:
    """Check the settings, as a worker and a scheduler do at their start: every mistake with its line and path.

    Names that nothing goes by are mistakes here; at a start they are warnings. VOs are known where
    DIRACX_CONFIG_BACKEND_URL is set. Exits with 1 when there is a mistake.

    Example: diracx-task-run config check tasks.yaml
    """
    registry = load_registry(module)
    _, problems, source, vos = _read(file, registry)
    lines = source.report(problems)
    if as_json:
        found = [_problem_record(problem, source) for problem in problems]
        echo_json({"source": source.name or None, "valid": not lines, "problems": found}, indent=2)
    if lines:
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        where = source.name or "the configuration of tasks"
        raise CliError(f"{where} has {count}", detail="".join(f"{line}\n" for line in lines))
    if not as_json:
        without = "" if vos is not None else "; VOs were not looked at, set DIRACX_CONFIG_BACKEND_URL"
        echo(f"{source.name} is valid{without}" if source.name else "nothing is configured: all is as in the code")


def _problem_record(problem: Problem, source: Source) -> dict[str, Any]:
    return {
        "path": ".".join(problem.path),
        "line": source.line(problem.path),
        "message": problem.message,
        "prevents_start": not problem.maybe_elsewhere,
    }


@app.command("show")
def show_settings(
    file: FileArgument = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this task; category:ClassName, or the class alone.")
    ] = None,
    vo: Annotated[str | None, typer.Option(metavar="VO", help="As it holds for this VO.")] = None,
    as_json: JsonOption = False,
    module: ModuleOption = None,
) -> None:
    """Show the resolved value of every setting of every task, and where it is set.

    Without --vo: the values for all VOs, and then for each VO that has settings of its own for the task.

    Example: diracx-task-run config show --task MySubmitPilotsTask --vo lhcb
    """
    registry = load_registry(module)
    names = sorted(registry) if task is None else [find_task(registry, task)]
    config, problems, source, vos = _read(file, registry)
    fatal = [problem for problem in problems if not problem.maybe_elsewhere]
    if config is None or fatal:
        raise CliError(
            "the configuration of tasks is wrong; `diracx-task-run config check` reports the same",
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
        show(SETTINGS, list(_rows(source, found["tasks"], found["limits"])), as_json)


def _rows(
    source: Source, tasks: Sequence[Mapping[str, Any]], limits: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """A row for each setting, the title on the first of each block: a task for a VO, an instance, a limit."""
    blocks: list[tuple[str, Mapping[str, Any]]] = []
    for record in tasks:
        of_vo = "" if record["vo"] is None else f" for {record['vo']}"
        blocks.append((f"{record['task']}{of_vo}", record["settings"]))
        blocks += [(f"{record['task']}@{key}{of_vo}", found) for key, found in record["instances"].items()]
    for record in limits:
        of_vo = "" if record["vo"] is None else f" for {record['vo']}"
        of_key = "" if record["key"] is None else f" {record['key']}"
        blocks.append((f"limits of {record['object']}{of_key}{of_vo}", record["settings"]))
    for title, settings in blocks:
        for number, (name, setting) in enumerate(settings.items()):
            shown = {"task": "" if number else title, "setting": name, "value": setting["value"]}
            yield shown | {"from": _origin(setting, source)}


def _origin(setting: Mapping[str, Any], source: Source) -> str:
    if setting["from"] == "code" or not source.name:
        return str(setting["from"])
    at = source.name if setting["line"] is None else f"{source.name}:{setting['line']}"
    return f"{setting['from']}, {at}"


@app.command("in-force")
def in_force(*, as_json: JsonOption = False, server: Server) -> None:
    """Show with which configuration each worker and scheduler runs, since when, and its problems.

    Processes with the same settings show the same digest. Where the written configuration is
    wrong, the last good one stays in force; exits with 1 then.

    Example: diracx-task-run config in-force --json
    """
    entries = server.query(active_configs)
    if as_json:
        print_json([entry.as_dict() for entry in entries])
    else:
        show(ACTIVE_CONFIGS, entries, as_json)
        _print_notes(entries)
    if any(entry.problems for entry in entries):
        raise typer.Exit(1)


def _print_notes(entries: Sequence[ActiveConfig]) -> None:
    """Each problem and warning once, with the processes that have it."""
    for kind, style in (("problems", "red"), ("warnings", "yellow")):
        lines: dict[str, list[str]] = {}
        for entry in entries:
            for line in getattr(entry, kind):
                lines.setdefault(line, []).append(entry.process)
        for line, processes in lines.items():
            where = processes[0] if len(processes) == 1 else f"{len(processes)} processes"
            console().print(styled(f"{line} ({where})", style), soft_wrap=True)


def _read(
    file: Path | None, registry: TaskRegistry
) -> tuple[TasksConfig | None, list[Problem], Source, list[str] | None]:
    """The settings, all that is wrong with them, where they were read, and the VOs where they are known.

    Raises:
        UsageProblem: when there is no such file.
        CliError: when the DiracX configuration cannot be read.
    """
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
