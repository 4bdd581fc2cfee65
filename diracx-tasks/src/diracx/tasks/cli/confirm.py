"""Asking before something is done that cannot be undone."""

from __future__ import annotations

import sys

import typer

from .errors import CliError, UsageProblem


def confirm(question: str, yes: bool) -> None:
    """Ask whoever sits there.

    Args:
        yes: it was answered on the command line.

    Raises:
        UsageProblem: when nobody sits there.
        CliError: when the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageProblem(f"{question} There is no terminal to ask on; add --yes")
    if not typer.confirm(question, err=True):
        raise CliError("nothing was changed")
