"""The command `gubbins`, which manages compute elements and pilots in the database."""

from __future__ import annotations

__all__ = ["main"]

from diracx.tasks.cli.program import run_program

from .app import app


def main() -> None:
    """Run the command; the process ends with 0, 1 (failure) or 2 (invalid input)."""
    run_program(app, "gubbins")
