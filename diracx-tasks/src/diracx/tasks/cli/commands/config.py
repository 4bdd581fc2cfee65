"""`config`: check the task configuration, show resolved settings and the configuration of each process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ...operations.settings import settings_records
from ...operations.views import ACTIVE_CONFIGS, SETTINGS
from ...plumbing.config import CONFIG_PATH_VARIABLE, Problem, Source, TasksConfig, check_config
from ...plumbing.config.active import active_configs, notes_of
from ...plumbing.exceptions import TaskConfigError
from ...plumbing.registry import TaskRegistry
from ..errors import CliError, UsageProblem, one_line
from ..options import JsonOption, ModuleOption, TaskOption, command_group
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
    """Check the settings, as workers and schedulers do at their start; list every mistake with its line and path.

    Unknown names are mistakes here; at a start they are warnings. VOs are checked where DIRACX_CONFIG_BACKEND_URL
    is set. Exits with 1 if there is a mistake.

    Example: diracx-task-run config check tasks.yaml
    """
    registry = load_registry(module)
    _, problems, source, vos = _read(file, registry)
    lines = source.report(problems)
    if as_json:
        found = [
            {
                "path": ".".join(problem.path),
                "line": source.line(problem.path),
                "message": problem.message,
                "prevents_start": not problem.maybe_elsewhere,
            }
            for problem in problems
        ]
        echo_json({"source": source.name or None, "valid": not lines, "problems": found}, indent=2)
    if lines:
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        where = source.name or "the configuration of tasks"
        raise CliError(f"{where} has {count}", detail="".join(f"{line}\n" for line in lines))
    if not as_json:
        without = "" if vos is not None else "; VOs were not checked, set DIRACX_CONFIG_BACKEND_URL"
        echo(f"{source.name} is valid{without}" if source.name else "nothing is configured: all is as in the code")


@app.command("show")
def show_settings(
    file: FileArgument = None,
    task: TaskOption = None,
    vo: Annotated[str | None, typer.Option(metavar="VO", help="The values for this VO.")] = None,
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
        raise UsageProblem(f"--vo {vo!r}: no such VO; known VOs: {', '.join(vos) or 'none'}")
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
    """Make a row per setting. The first row of each block (task, instance or limit) has its title."""
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
    """Show the active configuration of each worker and scheduler, since when, and its problems.

    Processes with the same settings show the same digest. While the stored configuration is wrong, processes keep
    the last valid one; exits with 1 then.

    Example: diracx-task-run config in-force --json
    """
    entries = server.query(active_configs)
    if as_json:
        print_json([entry.as_dict() for entry in entries])
    else:
        show(ACTIVE_CONFIGS, entries, as_json)
        for kind, line, processes in notes_of(entries):
            where = processes[0] if len(processes) == 1 else f"{len(processes)} processes"
            style = "red" if kind == "problems" else "yellow"
            console().print(styled(f"{line} ({where})", style), soft_wrap=True)
    if any(entry.problems for entry in entries):
        raise typer.Exit(1)


def _read(
    file: Path | None, registry: TaskRegistry
) -> tuple[TasksConfig | None, list[Problem], Source, list[str] | None]:
    """Read the settings, their problems and source, and the VOs if known."""
    if file is not None and not file.is_file():
        raise UsageProblem(f"{file}: no such file")
    config: Any = diracx_config()
    vos = None if config is None else sorted(config.registry)
    try:
        found, problems, source = check_config(registry, vos, path=file, config=config)
    except TaskConfigError as error:
        source = Source(str(file or os.environ.get(CONFIG_PATH_VARIABLE)))
        return None, [Problem((), str(error).removeprefix(f"{source.name}: "))], source, vos
    if not (file or os.environ.get(CONFIG_PATH_VARIABLE) or os.environ.get(CONFIG_VARIABLE)):
        source = Source()
    return found, problems, source, vos
