"""Writes the reference of the command lines from the programs themselves.

A page that holds the line `<!-- command-line: module:attribute program -->` gets there one section for each
command of that Typer application, or of the one that the function there makes: what it does, its arguments, its
options, their defaults.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterator
from enum import Enum
from importlib import import_module
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, ParameterInfo

_MARK = re.compile(r"^<!-- command-line: (\S+):(\S+) (\S+) -->$", re.MULTILINE)
#: Rich markup that Typer renders in a terminal; its escaped brackets stay, without their backslash.
_ESCAPED = re.compile(r"\\+\[")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return _MARK.sub(lambda found: describe(found[1], found[2], found[3]), markdown)


def describe(module: str, attribute: str, program: str) -> str:
    """The Markdown of one application, or of that which a function makes."""
    found = getattr(import_module(module), attribute)
    return "\n".join(_sections(found if isinstance(found, typer.Typer) else found(), program))


def _sections(app: typer.Typer, path: str) -> Iterator[str]:
    for command in app.registered_commands:
        if command.callback and not command.hidden:
            name = command.name or command.callback.__name__.replace("_", "-")
            yield from _section(command.callback, command.help, f"{path} {name}")
    for group in app.registered_groups:
        if group.typer_instance and not group.hidden:
            name = group.name if isinstance(group.name, str) else group.typer_instance.info.name
            yield from _sections(group.typer_instance, f"{path} {name}")


def _section(function: Callable[..., Any], text: str | None, path: str) -> Iterator[str]:
    yield f"## {path}\n"
    yield from _prose(text or inspect.getdoc(function) or "", path.partition(" ")[0])
    hints = get_type_hints(function, include_extras=True)
    rows = [
        row
        for parameter in inspect.signature(function).parameters.values()
        if (row := _row(parameter, hints[parameter.name]))
    ]
    if rows:
        yield "| | | default |\n|---|---|---|"
        yield from rows
    yield ""


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
    if inspect.isclass(bare) and issubclass(bare, Enum):
        return "|".join(str(member.value) for member in bare)
    return {int: "INTEGER", float: "NUMBER", str: "TEXT"}.get(bare, getattr(bare, "__name__", "VALUE").upper())


def _escape(text: str) -> str:
    """Prose of a help text as prose of Markdown."""
    return text.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*").replace("\n", " ")
