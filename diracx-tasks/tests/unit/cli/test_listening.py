"""Servers listen on loopback by default."""

from __future__ import annotations

from collections.abc import Iterator

import click
import typer
from diracx.tasks.cli import application
from diracx.tasks.web.auth.hosts import is_loopback


def hosts(command: click.Command, name: str = "") -> Iterator[tuple[str, str]]:
    """Commands and defaults of all options for listening addresses."""
    for each, below in getattr(command, "commands", {}).items():
        yield from hosts(below, f"{name} {each}".strip())
    for parameter in command.params:
        if parameter.name is not None and parameter.name.endswith("host"):
            yield f"{name} --{parameter.name.replace('_', '-')}", str(parameter.default)


def test_every_command_that_listens_does_so_on_loopback_by_default() -> None:
    found = dict(hosts(typer.main.get_command(application())))
    assert found.keys() >= {"dashboard --host", "worker --metrics-host", "scheduler --metrics-host"}
    assert [option for option, default in found.items() if not is_loopback(default)] == []
