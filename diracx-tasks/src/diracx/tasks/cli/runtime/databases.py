"""Opens the databases of `DIRACX_DB_URL_<NAME>`, after checking that they respond and have their tables."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from ...plumbing.exceptions import TaskConfigError
from ...plumbing.injection.placeholders import SQL, calls_below, family_of
from ...plumbing.injection.plan import Plan
from ...plumbing.plugins import load_plugin
from ...plumbing.sql.databases import database_urls, join_threads
from ..errors import CliError

if TYPE_CHECKING:
    from diracx.db.sql.utils import BaseSQLDB

    from ...plumbing.persistence import TaskDB

logger = logging.getLogger(__package__)

TASK_DB_VARIABLE = "DIRACX_DB_URL_TASKDB"
NO_TASK_DB = (
    "no database for dead letters is configured (without one they wait in Redis: `dlq waiting`); set "
    f"{TASK_DB_VARIABLE} to that of the workers, as in mysql+aiomysql://db.example.org/tasks"
)
_RESPONSE_SECONDS = 5.0


async def check_databases(plans: Iterable[Plan]) -> None:
    """Check that the configured databases of these plans respond and have their tables.

    Logs a warning if an optional one does not.
    """
    all_plans = list(plans)
    needed, required = (
        {
            call.__self__  # type: ignore[attr-defined]  # bound classmethods
            for plan in all_plans
            for call in calls_below(plan, {}, required=only)
            if family_of(call) == SQL
        }
        for only in (False, True)
    )
    if not needed:
        return
    for name, url in _database_urls().items():
        classes = database_classes(name)
        if needed.intersection(classes):
            try:
                async with _opened(name, url) as database:
                    await _check(database, name)
            except CliError as error:
                if required.intersection(classes):
                    raise
                logger.warning("%s (tasks for which it is optional run)", error)


@asynccontextmanager
async def open_task_db() -> AsyncIterator[TaskDB | None]:
    """Open the database of dead letters; None and a warning if it is not configured."""
    if not _database_urls("TaskDB").get("TaskDB"):
        logger.warning(
            "no database for dead letters: they wait in Redis; set %s to keep them in SQL", TASK_DB_VARIABLE
        )
        yield None
        return
    async with open_database("TaskDB", NO_TASK_DB) as database:
        yield database


@asynccontextmanager
async def unchecked_task_db() -> AsyncIterator[TaskDB | None]:
    """Open the database of dead letters without connecting to it; None if it is not configured."""
    url = _database_urls("TaskDB").get("TaskDB")
    async with _opened("TaskDB", url) if url else nullcontext() as database:
        yield database


@asynccontextmanager
async def open_database(name: str, missing: str, *, tables: bool = True) -> AsyncIterator[Any]:
    """Open a database, after checking that it responds.

    Args:
        name: as in DIRACX_DB_URL_<NAME>.
        missing: error message if it is not configured.
        tables: check that it has its tables, too.
    """
    async with _opened(name, database_url(name, missing)) as database:
        await _check(database, name, tables=tables)
        with explained_database(name):
            yield database


def database_url(name: str, missing: str) -> str:
    """Return the URL of a database; arguments as of `open_database`."""
    if url := _database_urls(name).get(name):
        return url
    raise CliError(missing)


def database_classes(name: str) -> list[type[Any]]:
    """Return the classes of a database, extensions before the class that they extend."""
    from diracx.db.sql.utils import BaseSQLDB

    try:
        return load_plugin(partial(BaseSQLDB.available_implementations, name))
    except Exception as error:
        raise CliError(f"the class of the database {name} cannot be loaded: {error}") from error


def _database_urls(only: str | None = None) -> dict[str, str]:
    """Return URLs by database name, from DIRACX_DB_URL_<NAME>."""
    logging.getLogger("diracx.db.sql.utils.base").setLevel(logging.CRITICAL)  # reported as CliError
    try:
        return database_urls(only)
    except TaskConfigError as error:
        raise CliError(str(error)) from error


async def _check(database: BaseSQLDB, name: str, *, tables: bool = True) -> None:
    """Check that a database responds and has its tables."""
    from ...plumbing.sql.errors import connecting, explained
    from ...plumbing.sql.session import not_ready

    before = set(threading.enumerate())
    try:
        with explained_database(name), explained(name):
            with connecting(name):
                async with asyncio.timeout(_RESPONSE_SECONDS), database.engine.connect():
                    pass
            if tables:
                async with asyncio.timeout(_RESPONSE_SECONDS), database.engine.begin() as connection:
                    lacks = await connection.run_sync(not_ready, type(database), name)
                if lacks is not None:
                    raise lacks
    except CliError:
        await database.engine.dispose()  # ends threads of connections that were not lost
        await join_threads(before)
        raise


@asynccontextmanager
async def _opened(name: str, url: str) -> AsyncIterator[Any]:
    """Open a database without connecting to it."""
    from ...plumbing.sql.errors import DatabaseError, connecting

    database_class = database_classes(name)[0]
    async with AsyncExitStack() as stack:
        try:
            with connecting(name):
                database = database_class(db_url=url)
                await stack.enter_async_context(database.engine_context())
        except DatabaseError as error:  # without the text of its cause, which may have the URL with its password
            raise CliError(str(error)) from error
        yield database


@contextmanager
def explained_database(name: str) -> Iterator[None]:
    """Convert SQL errors inside the block to a CliError."""
    from sqlalchemy.exc import SQLAlchemyError

    from ...plumbing.sql.errors import DatabaseError, describe
    from ...plumbing.sql.migrations import MigrationError

    try:
        yield
    except DatabaseError as error:
        raise CliError(error.detail) from error
    except MigrationError as error:
        raise CliError(str(error)) from error
    except SQLAlchemyError as error:
        if (described := describe(name, error)) is not None:
            raise CliError(str(described)) from error
        # Without the statement.
        raise CliError(f"the database {name} raised an error: {getattr(error, 'orig', None) or error}") from error
