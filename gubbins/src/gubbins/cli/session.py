"""Runs commands on the database, writes them to the audit log, and prints results."""

from __future__ import annotations

import asyncio
import getpass
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import Any, TypeVar

from diracx.tasks.cli.errors import CliError
from diracx.tasks.cli.output import echo, show
from diracx.tasks.cli.runtime.databases import open_database
from diracx.tasks.operations.audited_actions import AuditedActions
from diracx.tasks.operations.views import Column, View
from diracx.tasks.plumbing._util.passwords import mask
from diracx.tasks.plumbing.broker.address import REDIS_URL_VARIABLE
from diracx.tasks.plumbing.broker.connection import AddressError, async_client, redis_url_from_environment
from redis.exceptions import RedisError

from gubbins.db import URL_VARIABLE
from gubbins.db.registry import REGISTRY, REGISTRY_VARIABLE
from gubbins.domain.audit_actions import AuditAction
from gubbins.domain.exceptions import GubbinsError
from gubbins.domain.text import one_line

T = TypeVar("T")

NO_DATABASE = f"{URL_VARIABLE} is not set: export {URL_VARIABLE}=sqlite+aiosqlite:////path/to/pilots.db"

NO_REGISTRY = (
    f"no pilot registry is configured: set {REGISTRY_VARIABLE} to the URL of DiracX's {REGISTRY}, as in "
    "mysql+aiomysql://db.example.org/PilotAgentsDB"
)
_PROGRESS_SECONDS = 5.0


def in_database(work: Callable[[Any], Awaitable[T]], *, tables: bool = True) -> T:
    """Do something with the database named in the environment.

    Args:
        tables: whether it must have its tables.

    Raises:
        CliError: it is not named, cannot be reached, has no tables, or the work was refused.
    """

    async def connected() -> T:
        async with open_database("MyPilotDB", NO_DATABASE, tables=tables) as db:
            return await work(db)

    try:
        return asyncio.run(connected())
    except GubbinsError as error:
        raise CliError(str(error)) from error


async def in_registry(work: Callable[[Any], Awaitable[T]]) -> T:
    """Do something with the pilot registry named in the environment.

    Raises:
        CliError: it is not named, cannot be reached, or has no tables.
    """
    async with open_database(REGISTRY, NO_REGISTRY) as registry:
        return await work(registry)


def show_progress(what: str) -> Callable[[int], None]:
    """Make a function that tells on stderr, every few seconds, how many are done."""
    told = time.monotonic()

    def show(done: int) -> None:
        nonlocal told
        if time.monotonic() - told >= _PROGRESS_SECONDS:
            told = time.monotonic()
            echo(f"gubbins: {done:,} {what}", err=True)

    return show


def recorded(
    action: AuditAction, target: str, work: Callable[[Any], Awaitable[T]], summary: Callable[[T], str]
) -> T:
    """Do something in the database, and write it to the audit log of the task system.

    Where no server of the task system is named it is done all the same, with a warning.

    Args:
        target: what it is done to.
        summary: what came of it, in a few words.

    Raises:
        CliError: as above; or the audit log cannot be written, and nothing was done.
    """
    try:
        url = redis_url_from_environment()
    except AddressError as error:
        raise CliError(str(error)) from error
    if not url:
        result = in_database(work)
        echo(f"gubbins: not written to the audit log: {REDIS_URL_VARIABLE} is not set", err=True)
        return result

    async def perform(db: Any) -> T:
        async with async_client(url) as redis:
            return await AuditedActions.at_command_line(redis).perform(action, target, lambda: work(db), summary)

    try:
        return in_database(perform)
    except (AddressError, RedisError) as error:
        raise CliError(
            f"the audit log cannot be written at {mask(url)}: {one_line(error)}; correct {REDIS_URL_VARIABLE}, "
            "or unset it to do without"
        ) from error


def me() -> str:
    """The user of the command, for records."""
    try:
        return f"operator {getpass.getuser()}"
    except (KeyError, OSError):  # a container's user has no name
        return "operator"


def emit(value: Any) -> None:
    """Print a result for scripts."""
    print(json.dumps(value, indent=2, default=_plain))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value.isoformat() if isinstance(value, datetime) else str(value)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a result for people. Numbers are right-aligned, times are UTC to the second."""
    view: View[Sequence[Any]] = View("none", tuple(_column(*each, rows) for each in enumerate(columns)))
    echo(one_line(title))
    show(view, rows, as_json=False)


def _column(index: int, name: str, rows: Sequence[Sequence[Any]]) -> Column[Sequence[Any]]:
    numeric = bool(rows) and all(type(row[index]) in (int, float) for row in rows)
    return Column(name, lambda row: row[index], right=numeric)
