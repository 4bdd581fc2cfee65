"""Opens the databases that `DIRACX_DB_URL_<NAME>` names, and checks that they answer and have their tables."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from ...plumbing.exceptions import TaskConfigError
from ..errors import CliError, explained_database

if TYPE_CHECKING:
    from diracx.db.sql.utils import BaseSQLDB

    from ...plumbing.injection.plan import Plan
    from ...plumbing.persistence import TaskDB

logger = logging.getLogger(__package__)

TASK_DB_VARIABLE = "DIRACX_DB_URL_TASKDB"
_ANSWER_SECONDS = 5.0


async def check_databases(plans: Iterable[Plan]) -> None:
    """Make sure that the configured databases these plans need answer and have their tables.

    Raises:
        CliError: naming the database that does not.
    """
    from ...plumbing.injection.placeholders import SQL, calls_below, family_of

    wanted = {call.__self__ for plan in plans for call in calls_below(plan, {}) if family_of(call) == SQL}  # type: ignore[attr-defined]  # bound classmethods
    if not wanted:
        return
    for name, url in _database_urls().items():
        classes = _database_classes(name)
        if wanted.intersection(classes):
            async with _checked(name, classes[0], url):
                pass


@asynccontextmanager
async def open_task_db() -> AsyncIterator[TaskDB | None]:
    """The database of dead letters, None (and a warning) when it is not configured.

    Raises:
        CliError: when it does not answer or has no tables.
    """
    if not _database_urls("TaskDB").get("TaskDB"):
        logger.warning(
            "no database for dead letters: they wait in Redis; set %s to keep them in SQL", TASK_DB_VARIABLE
        )
        yield None
        return
    async with required_task_db() as database:
        yield database


@asynccontextmanager
async def unchecked_task_db() -> AsyncIterator[TaskDB | None]:
    """The database of dead letters, whether it answers or not; None where none is configured.

    Raises:
        CliError: when its URL cannot be used.
    """
    if not _database_urls("TaskDB").get("TaskDB"):
        yield None
        return
    async with AsyncExitStack() as stack:
        yield await _opened(stack, "TaskDB", _database_classes("TaskDB")[0], task_db_url())


@asynccontextmanager
async def required_task_db(*, create: bool = False) -> AsyncIterator[TaskDB]:
    """The database of dead letters.

    Args:
        create: make its tables where they are not there.

    Raises:
        CliError: when it is not configured, does not answer or has no tables; and when it fails inside the block.
    """
    url = task_db_url()
    async with _checked("TaskDB", _database_classes("TaskDB")[0], url, create=create) as database:
        with explained_database("TaskDB"):
            yield database


def task_db_url() -> str:
    """Where dead letters are.

    Raises:
        CliError: when that is not configured.
    """
    url = _database_urls("TaskDB").get("TaskDB")
    if not url:
        raise CliError(
            "no database for dead letters is configured (without one they wait in Redis: `dlq waiting`); set "
            f"{TASK_DB_VARIABLE} to that of the workers, as in mysql+aiomysql://db.example.org/tasks"
        )
    return url


def _database_urls(only: str | None = None) -> dict[str, str]:
    """URL by database name, from DIRACX_DB_URL_<NAME>."""
    from ...plumbing.sql.databases import database_urls

    logging.getLogger("diracx.db.sql.utils.base").setLevel(logging.CRITICAL)  # it is reported by us
    try:
        return database_urls(only)
    except TaskConfigError as error:
        raise CliError(str(error)) from error


def _database_classes(name: str) -> list[type[Any]]:
    from diracx.db.sql.utils import BaseSQLDB

    try:
        return BaseSQLDB.available_implementations(name)
    except Exception as error:
        raise CliError(f"the class of the database {name} cannot be loaded: {error}") from error


@asynccontextmanager
async def _checked(
    name: str, database_class: type[BaseSQLDB], url: str, *, create: bool = False
) -> AsyncIterator[Any]:
    """The database, open, after it answered and showed its tables."""
    from ...plumbing.sql.databases import join_threads
    from ...plumbing.sql.errors import connecting, explained
    from ...plumbing.sql.migrations import Migrations
    from ...plumbing.sql.session import not_ready

    migrations: Migrations | None = getattr(database_class, "migrations", None)
    async with AsyncExitStack() as stack:
        database = await _opened(stack, name, database_class, url)
        before = set(threading.enumerate())
        try:
            with explained_database(name), explained(name):
                with connecting(name):
                    async with asyncio.timeout(_ANSWER_SECONDS), database.engine.connect():
                        pass
                if create and migrations is not None:
                    async with asyncio.timeout(_ANSWER_SECONDS):
                        await migrations.create(database.engine)
                async with asyncio.timeout(_ANSWER_SECONDS), database.engine.begin() as connection:
                    if (lacks := await connection.run_sync(not_ready, database_class, name)) is not None:
                        raise lacks
        except CliError:
            await join_threads(before)
            raise
        yield database


async def _opened(stack: AsyncExitStack, name: str, database_class: type[Any], url: str) -> Any:
    try:
        database = database_class(db_url=url)
        await stack.enter_async_context(database.engine_context())
    except Exception as error:
        # The error of a bad URL shows it in full.
        raise CliError(
            f"DIRACX_DB_URL_{name.upper()} cannot be used ({type(error).__name__}); check its dialect, driver and "
            "address"
        ) from error
    return database
