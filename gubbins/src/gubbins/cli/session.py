"""Helpers of the commands: database, audit log, input files and output."""

from __future__ import annotations

import asyncio
import getpass
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from diracx.tasks.cli.errors import CliError, UsageProblem, one_line
from diracx.tasks.cli.output import echo, print_json, show
from diracx.tasks.cli.runtime.databases import open_database
from diracx.tasks.operations.audited_actions import AuditedActions
from diracx.tasks.operations.views import Column, View
from diracx.tasks.plumbing.broker.address import REDIS_URL_VARIABLE
from diracx.tasks.plumbing.broker.connection import AddressError, async_client, redis_url_from_environment
from redis.exceptions import RedisError

from gubbins.db import URL_VARIABLE
from gubbins.domain.audit_actions import AuditAction
from gubbins.domain.exceptions import GubbinsError

T = TypeVar("T")

NO_DATABASE = f"{URL_VARIABLE} is not set: export {URL_VARIABLE}=sqlite+aiosqlite:////path/to/pilots.db"
_PROGRESS_SECONDS = 5.0


def with_database(work: Callable[[Any], Awaitable[T]], *, tables: bool = True) -> T:
    """Run work with the pilot database of the environment, and return its result.

    Args:
        tables: True: the tables must exist.

    Raises:
        CliError: the database is not configured, unreachable or without tables; or an error of the work.
    """

    async def connected() -> T:
        async with open_database("MyPilotDB", NO_DATABASE, tables=tables) as db:
            return await work(db)

    try:
        return asyncio.run(connected())
    except GubbinsError as error:
        raise CliError(str(error)) from error


def progress_printer(what: str) -> Callable[[int], None]:
    """Make a function that prints progress to stderr every few seconds."""
    shown_at = time.monotonic()

    def show(done: int) -> None:
        nonlocal shown_at
        if time.monotonic() - shown_at >= _PROGRESS_SECONDS:
            shown_at = time.monotonic()
            echo(f"gubbins: {done:,} {what}", err=True)

    return show


def audited(
    action: AuditAction, target: str, work: Callable[[Any], Awaitable[T]], summary: Callable[[T], str]
) -> T:
    """Run work with the pilot database, and write it to the audit log of the task system.

    If no server of the task system is configured, a warning is printed instead.

    Args:
        target: object of the action.
        summary: describes the result in the audit log.

    Raises:
        CliError: as `with_database`; or the audit log cannot be written, and nothing was done.
    """
    try:
        url = redis_url_from_environment()
    except AddressError as error:
        raise CliError(str(error)) from error
    if not url:
        result = with_database(work)
        echo(f"gubbins: not written to the audit log: {REDIS_URL_VARIABLE} is not set", err=True)
        return result

    async def perform(db: Any) -> T:
        async with async_client(url) as redis:
            return await AuditedActions.for_command_line(redis).perform(action, target, lambda: work(db), summary)

    try:
        return with_database(perform)
    except (AddressError, RedisError) as error:
        raise CliError(
            f"the audit log cannot be written at {one_line(url)}: {one_line(str(error))}; correct "
            f"{REDIS_URL_VARIABLE}, or unset it to work without an audit log"
        ) from error


def current_operator() -> str:
    """Name of the user of the command, for records."""
    try:
        return f"operator {getpass.getuser()}"
    except (KeyError, OSError):  # users of containers may have no name
        return "operator"


def read_input(file: Path) -> tuple[str, str]:
    """Read a file, or standard input (`-`); return its name for messages, and its text.

    Raises:
        UsageProblem: the file cannot be read.
    """
    name = "standard input" if str(file) == "-" else str(file)
    try:
        return name, sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageProblem(f"cannot read {name}: {reason}") from error


def print_result(value: Any, text: str, *, as_json: bool) -> None:
    """Print a result as JSON, or else as text."""
    if as_json:
        print_json(value)
    else:
        echo(text)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table below a title, with right-aligned numbers."""
    rows = list(rows)
    echo(one_line(title))
    show(View("none", tuple(_column(*each, rows) for each in enumerate(columns))), rows, as_json=False)


def _column(index: int, name: str, rows: Sequence[Sequence[Any]]) -> Column[Sequence[Any]]:
    numeric = bool(rows) and all(type(row[index]) in (int, float) for row in rows)
    return Column(name, lambda row: row[index], right=numeric)
