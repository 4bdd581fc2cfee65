"""The command `gubbins`: compute elements and pilots, for operators. Works on the database directly."""

from __future__ import annotations

__all__ = ["main"]

from diracx.tasks.cli.program import run_program

from .app import app


def main() -> None:
    """Entry point of the command; ends the process with 0, 1 (it did not work) or 2 (bad input)."""
    run_program(app, "gubbins")
