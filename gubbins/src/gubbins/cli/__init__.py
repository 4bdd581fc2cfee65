"""The command `gubbins`, which manages compute elements and pilots in the database."""

from __future__ import annotations

__all__ = ["main"]

from importlib import import_module

from diracx.tasks.cli.program import run_program


def main() -> None:
    """Run the command; the process ends with 0, 1 (failure) or 2 (invalid input)."""
    run_program(lambda: import_module("gubbins.cli.app").app, "gubbins")
