"""Run commands on the database, report errors in one line, and print results."""

from __future__ import annotations

__all__ = ["CommandError", "database_url", "echo", "emit", "in_database", "recorded", "table"]

import asyncio
import json
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from gubbins.db import URL_VARIABLE
from gubbins.domain.text import one_line

if TYPE_CHECKING:
    from gubbins.domain.audit_actions import AuditAction

T = TypeVar("T")

_CONNECT_SECONDS = 10


class CommandError(Exception):
    """The command did not work: one line (or several, one per mistake) for stderr, and an exit code."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def in_database(work: Callable[[Any], Awaitable[T]]) -> T:
    """Do something with the database named in the environment.

    Raises:
        CommandError: it is not named, cannot be reached, has no tables, or the work was refused.
    """
    from diracx.tasks.plumbing.sql.databases import join_threads
    from diracx.tasks.plumbing.sql.errors import DatabaseError, connecting, describe
    from diracx.tasks.plumbing.sql.migrations import MigrationError
    from sqlalchemy.exc import SQLAlchemyError

    from gubbins.db.sql import MyPilotDB
    from gubbins.domain.exceptions import GubbinsError

    url = database_url()

    async def connected() -> T:
        db = MyPilotDB(url)
        others = set(threading.enumerate())
        try:
            async with db.engine_context():
                with connecting(db.name):
                    async with asyncio.timeout(_CONNECT_SECONDS), db.engine.connect():
                        pass
                return await work(db)
        except DatabaseError:
            await join_threads(others)
            raise

    try:
        return asyncio.run(connected())
    except (GubbinsError, MigrationError) as error:
        raise CommandError(str(error)) from error
    except DatabaseError as error:
        raise CommandError(error.detail) from error
    except (SQLAlchemyError, ModuleNotFoundError) as error:
        if (told := describe("MyPilotDB", error)) is not None:
            raise CommandError(str(told)) from error
        # Without the statement.
        words = one_line(getattr(error, "orig", None) or error)
        raise CommandError(f"the database refuses this: {words}") from error


def recorded(action: AuditAction, target: str, work: Callable[[Any], Awaitable[T]], told: Callable[[T], str]) -> T:
    """Do something in the database, and write it to the audit log of the task system.

    Where no server of the task system is named it is done all the same, with a warning.

    Args:
        target: what it is done to.
        told: what came of it, in a few words.

    Raises:
        CommandError: as above; or the audit log cannot be written, and nothing was done.
    """
    from diracx.tasks.plumbing._util.passwords import mask
    from diracx.tasks.plumbing.broker.address import REDIS_URL_VARIABLE
    from diracx.tasks.plumbing.broker.connection import AddressError, async_client, redis_url_from_environment
    from redis.exceptions import RedisError

    try:
        url = redis_url_from_environment()
    except AddressError as error:
        raise CommandError(str(error)) from error
    if not url:
        result = in_database(work)
        echo(f"gubbins: not written to the audit log: {REDIS_URL_VARIABLE} is not set", err=True)
        return result

    async def do(db: Any) -> T:
        from diracx.tasks.operations.audited_actions import AuditedActions

        async with async_client(url) as redis:
            return await AuditedActions.at_command_line(redis).perform(action, target, lambda: work(db), told)

    try:
        return in_database(do)
    except (AddressError, RedisError) as error:
        raise CommandError(
            f"the audit log cannot be written at {mask(url)}: {one_line(error)}; correct {REDIS_URL_VARIABLE}, "
            "or unset it to do without"
        ) from error


def database_url() -> str:
    """URL of the database, from the environment.

    Raises:
        CommandError: it is not set.
    """
    url = os.environ.get(URL_VARIABLE)
    if not url:
        raise CommandError(
            f"{URL_VARIABLE} is not set: export {URL_VARIABLE}=sqlite+aiosqlite:////path/to/pilots.db"
        )
    return url


def echo(text: str, *, err: bool = False, end: str = "\n") -> None:
    """Print text for people. What sites and users have written into it does not steer the terminal."""
    from diracx.tasks.plumbing._util.printable import printable

    print(printable(text), file=sys.stderr if err else sys.stdout, end=end)


def emit(value: Any) -> None:
    """Print a result for scripts."""
    print(json.dumps(value, indent=2, default=_plain))


def _plain(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a result for people. Numbers are right-aligned, times are UTC to the second."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(_cell(title), "table.title"), title_justify="left")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(type(row[index]) in (int, float) for row in rows)
        shown.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(_cell(value)) for value in row))
    # A pipe has no width: nothing is folded there.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(shown)


def _cell(value: Any) -> str:
    from diracx.tasks.plumbing._util.printable import printable_line

    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:%Y-%m-%d %H:%M:%S}" if isinstance(value, datetime) else printable_line(str(value))
