"""The options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from typing import Annotated, Any, get_type_hints

import typer

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Registry name of the task: category:ClassName.")
]
ArgsOption = Annotated[
    str, typer.Option("--args", metavar="JSON", help="Positional arguments, a JSON list: '\\[1, \"x\"]'.")
]
KwargsOption = Annotated[
    str, typer.Option("--kwargs", metavar="JSON", help='Named arguments, a JSON object: \'{"vo": "lhcb"}\'.')
]
ModuleOption = Annotated[
    list[str] | None,
    typer.Option(
        "--module",
        metavar="FILE.py|PACKAGE.MODULE",
        help="Register the tasks of a plain module, under the category of its last name. May be repeated.",
    ),
]
RedisUrlOption = Annotated[
    str | None,
    typer.Option(
        "--redis-url",
        metavar="URL",
        help="Redis or Valkey server; else DIRACX_TASKS_REDIS_URL, else redis://localhost. "
        "A password in it can be seen by every user of the host: rather use the variable, or a file.",
    ),
]
RedisUrlFileOption = Annotated[
    str | None,
    typer.Option(
        "--redis-url-file",
        metavar="FILE",
        help="File that holds the URL of the server, for one with a password; else DIRACX_TASKS_REDIS_URL_FILE.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
LimitOption = Annotated[int, typer.Option("--limit", min=1, metavar="N", help="At most this many.")]
AfterOption = Annotated[
    str | None, typer.Option("--after", metavar="CURSOR", help="Read on: the `after` of the page before (--json).")
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


class LogLevel(StrEnum):
    """Lowest severity that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


LogLevelOption = Annotated[
    LogLevel | None,
    typer.Option(
        "--log-level",
        help="Least level of what DiracX and tasks log; else DIRACX_LOG_LEVEL. That of libraries is "
        "DIRACX_LOG_LIBRARIES_LEVEL; DIRACX_LOG_FORMAT=json logs JSON.",
        show_default=False,
    ),
]


class Commands(typer.Typer):
    """A Typer application whose commands may share groups of options: of each parameter that is a dataclass, the
    fields are the options, and the command gets the dataclass.
    """

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """As of `typer.Typer`."""
        register = super().command(name, **settings)
        return lambda function: register(spread(function))


def command_group(name: str, help_text: str, **settings: Any) -> Commands:
    """Commands below a common name, which alone shows their help and exits with 2.

    Args:
        settings: as of `typer.Typer`.
    """
    group = Commands(name=name, help=help_text, **{"rich_markup_mode": "rich", **settings})

    @group.callback(invoke_without_command=True)
    def show_help(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())
            raise typer.Exit(2)

    return group


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Make the fields of each parameter that is a dataclass options of a command."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = parameter.annotation
        if not (isinstance(group, type) and is_dataclass(group)):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = group
        hints = get_type_hints(group, include_extras=True)
        for field in fields(group):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
                )
            )

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect looks for it
    return with_options
