"""The command `gubbins`: compute elements and pilots, for operators. Works on the database directly."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Entry point of the command; ends the process with 0, 1 (it did not work) or 2 (bad input)."""
    from .app import run

    run()
