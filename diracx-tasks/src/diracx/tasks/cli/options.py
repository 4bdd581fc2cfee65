"""The options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, get_type_hints

import typer

ModuleOption = Annotated[
    list[str] | None,
    typer.Option(
        "--module",
        metavar="FILE.py|PACKAGE.MODULE",
        help="Register the tasks of a module; its name is their category. May be repeated.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
LimitOption = Annotated[int, typer.Option("--limit", min=1, metavar="N", help="Maximum number of rows.")]
AfterOption = Annotated[
    str | None, typer.Option("--after", metavar="CURSOR", help="Next page: `after` of the previous one (--json).")
]
TaskOption = Annotated[
    str | None,
    typer.Option("--task", metavar="NAME", help="Only this task: category:ClassName, or ClassName alone."),
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]


LogLevel = Literal["debug", "info", "warning", "error"]
LogLevelOption = Annotated[
    LogLevel | None,
    typer.Option(
        "--log-level",
        help="Log level of DiracX and tasks; else DIRACX_LOG_LEVEL. That of libraries is "
        "DIRACX_LOG_LIBRARIES_LEVEL; DIRACX_LOG_FORMAT=json logs JSON.",
        show_default=False,
    ),
]


class Commands(typer.Typer):
    """Typer application whose commands share groups of options: the fields of dataclass parameters."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """As of `typer.Typer`."""
        register = super().command(name, **settings)
        return lambda function: register(spread(function))


def command_group(name: str, help_text: str, **settings: Any) -> Commands:
    """Make a command group. Without a command it prints its help and exits with 2."""
    group = Commands(name=name, help=help_text, no_args_is_help=True, **{"rich_markup_mode": "rich", **settings})
    group.callback()(lambda: None)  # else a single command would have no name
    return group


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each dataclass parameter of a command by one option per field."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = parameter.annotation
        if not (isinstance(group, type) and is_dataclass(group)):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = group
        hints = get_type_hints(group, include_extras=True)
        options = inspect.signature(group).parameters.values()
        parameters += (option.replace(annotation=hints[option.name]) for option in options)

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    # Rich keeps the line breaks of all paragraphs but the first.
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    with_options.__doc__ = "\n\n".join(" ".join(each.split()) for each in paragraphs)
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect looks for it
    return with_options
