"""Writes the reference of the command lines from the programs themselves.

The line `<!-- command-line: module:attribute program -->` of a page is replaced by one section for each command of
that Typer application, or of the one that the function makes: description, arguments, options and defaults.
Options of several commands are described once, before them.
"""

from __future__ import annotations

import inspect
import re
import types
from collections import Counter
from collections.abc import Callable, Iterator
from enum import Enum
from importlib import import_module
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, ParameterInfo

_MARK = re.compile(r"^<!-- command-line: (\S+):(\S+) (\S+) -->$", re.MULTILINE)
#: Rich markup that Typer renders in a terminal; its escaped brackets stay, without their backslash.
_ESCAPED = re.compile(r"\\+\[")
#: Number of commands with the same option from which on it is described once.
_SHARED = 4


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return _MARK.sub(lambda found: describe(found[1], found[2], found[3]), markdown)


def describe(module: str, attribute: str, program: str) -> str:
    """The Markdown of one application, or of that which a function makes."""
    found = getattr(import_module(module), attribute)
    commands = list(_commands(found if isinstance(found, typer.Typer) else found(), program))
    counts = Counter(row for _, _, rows in commands for row in rows if row.startswith("| `--"))
    shared = [row for row, number in counts.items() if number >= _SHARED]
    lines = [f"## {program}: options of several commands\n", *_table(shared)] if shared else []
    for path, text, rows in commands:
        lines += [f"## {path}\n", *_prose(text, program), *_table([row for row in rows if row not in shared])]
        if also := [row.split(" ", 2)[1].rstrip(",") for row in rows if row in shared]:
            lines.append(f"Options of several commands: {', '.join(also)}\n")
    return "\n".join(lines)


def _table(rows: list[str]) -> list[str]:
    return ["| | | default |\n|---|---|---|", *rows, ""] if rows else []


def _commands(app: typer.Typer, path: str) -> Iterator[tuple[str, str, list[str]]]:
    """Path, help and rows of the options of each command."""
    for command in app.registered_commands:
        if command.callback and not command.hidden:
            name = command.name or command.callback.__name__.replace("_", "-")
            text = command.help or inspect.getdoc(command.callback) or ""
            yield f"{path} {name}", text, _rows(command.callback)
    for group in app.registered_groups:
        if group.typer_instance and not group.hidden:
            group_name = group.name if isinstance(group.name, str) else group.typer_instance.info.name
            yield from _commands(group.typer_instance, f"{path} {group_name}")


def _rows(function: Callable[..., Any]) -> list[str]:
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return [row for parameter in parameters if (row := _row(parameter, hints[parameter.name]))]


def _prose(text: str, program: str) -> Iterator[str]:
    for paragraph in _ESCAPED.sub("[", text).split("\n\n"):
        lead, colon, example = paragraph.partition(": ")
        if lead == "Example" and colon and example.startswith(program):
            yield f"```bash\n{example}\n```\n"
        elif paragraph.startswith("\b\n"):  # Typer's mark for text whose lines stay as they are
            yield f"```text\n{inspect.cleandoc(paragraph[2:])}\n```\n"
        else:
            yield f"{_escape(paragraph)}\n"


def _row(parameter: inspect.Parameter, hint: Any) -> str | None:
    if get_origin(hint) is not Annotated:
        return None
    bare, *metadata = get_args(hint)
    info = next((item for item in metadata if isinstance(item, ParameterInfo)), None)
    if info is None or info.hidden:
        return None
    required = parameter.default is inspect.Parameter.empty
    default = "required" if required else _default(parameter.default)
    what = _ESCAPED.sub("[", info.help or "")
    return f"| {_names(parameter.name, bare, info)} | {_escape(what)} | {default} |"


def _default(value: Any) -> str:
    if value is None or value is False or value == []:
        return ""
    return f"`{value.value if isinstance(value, Enum) else value}`"


def _names(name: str, bare: Any, info: ParameterInfo) -> str:
    if isinstance(info, ArgumentInfo):
        return f"`{info.metavar or name.upper()}`"
    # Inside Annotated, what Typer calls the default is the first name.
    given = [info.default, *(getattr(info, "param_decls", None) or ())]
    declared = [text for text in given if isinstance(text, str) and text.startswith("-")]
    names = ", ".join(f"`{option}`" for option in declared or [f"--{name.replace('_', '-')}"])
    bare = _without_none(bare)
    if bare is bool:
        return names
    value = info.metavar or _value(bare)
    return f"{names} `{value}`"


def _without_none(bare: Any) -> Any:
    if get_origin(bare) in (Union, types.UnionType):
        bare = next(part for part in get_args(bare) if part is not types.NoneType)
    return get_args(bare)[0] if get_origin(bare) is list else bare


def _value(bare: Any) -> str:
    if get_origin(bare) is Literal:
        return "|".join(map(str, get_args(bare)))
    if inspect.isclass(bare) and issubclass(bare, Enum):
        return "|".join(str(member.value) for member in bare)
    return {int: "INTEGER", float: "NUMBER", str: "TEXT"}.get(bare, getattr(bare, "__name__", "VALUE").upper())


def _escape(text: str) -> str:
    """Prose of a help text as prose of Markdown."""
    return text.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*").replace("\n", " ")
