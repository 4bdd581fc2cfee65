"""Databases, DiracX configuration and settings of tasks, as the environment variables name them."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import CliError, explained_database

if TYPE_CHECKING:
    from diracx.core.config import Config
    from diracx.db.sql.utils import BaseSQLDB

    from ...plumbing.broker import RedisStreamBroker
    from ...plumbing.config import TasksConfig
    from ...plumbing.config.sources import ConfigReader
    from ...plumbing.injection.plan import Plan
    from ...plumbing.persistence import TaskDB
    from ...plumbing.registry import TaskRegistry

logger = logging.getLogger(__package__)

CONFIG_VARIABLE = "DIRACX_CONFIG_BACKEND_URL"
TASK_DB_VARIABLE = "DIRACX_DB_URL_TASKDB"
_ANSWER_SECONDS = 5.0


# --- databases ----------------------------------------------------------------------------------------------


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
    from ...plumbing.exceptions import TaskConfigError
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


# --- configuration ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """The settings of tasks and the VOs, as they are written."""

    tasks: TasksConfig
    vos: tuple[str, ...] | None
    """None where there is no DiracX configuration."""
    reader: ConfigReader
    """Reads it again, and checks it as at the start."""


def read_configuration(registry: TaskRegistry) -> Configuration:
    """The settings of tasks, and the VOs. Names in it that match nothing are logged as warnings.

    Raises:
        CliError: when it cannot be read, or is wrong.
    """
    from ...plumbing.config import checked_tasks_config
    from ...plumbing.config.sources import ConfigReader

    reader = ConfigReader.of_environment(registry)
    with _explained_configuration():
        config = reader.read_config()
        vos = None if config is None else tuple(sorted(config.registry))
        tasks, warnings = checked_tasks_config(registry, vos, config=config)
    for line in warnings:
        logger.warning("configuration of tasks: %s", line)
    return Configuration(tasks, vos, reader)


@asynccontextmanager
async def watch_configuration(
    config: Configuration,
    registry: TaskRegistry,
    broker: RedisStreamBroker,
    role: str,
    on_change: Callable[[TasksConfig, tuple[str, ...] | None], None],
) -> AsyncIterator[None]:
    """Follow changes of the configuration, as it was read at the start, inside the block."""
    from ...plumbing.config import unknown_names
    from ...plumbing.config.watcher import ConfigWatcher

    async with ConfigWatcher(
        config.reader,
        config.tasks,
        config.vos,
        on_change,
        role=role,
        redis=broker.redis,
        process=broker.consumer_name,
        warn=lambda tasks, vos: unknown_names(tasks, registry.keys(), vos),
    ):
        yield


def tasks_config() -> TasksConfig:
    """The settings of tasks alone, as a client needs them; errors as of `read_configuration`."""
    from ...plumbing.config.sources import ConfigReader

    with _explained_configuration():
        return ConfigReader.of_environment().read_tasks()


def diracx_config() -> Config | None:
    """The DiracX configuration, None where there is none; errors as of `read_configuration`."""
    from ...plumbing.config.sources import ConfigReader

    with _explained_configuration():
        return ConfigReader.of_environment().read_config()


@contextmanager
def _explained_configuration() -> Iterator[None]:
    from ...plumbing.config.sources import explain
    from ...plumbing.exceptions import TaskConfigError

    try:
        yield
    except TaskConfigError as error:
        lines = str(error).splitlines()
        if len(lines) == 1:
            raise CliError(f"the configuration of tasks is wrong: {lines[0]}") from error
        raise CliError(
            f"the configuration of tasks is wrong in {len(lines)} places", detail=f"{error}\n"
        ) from error
    except Exception as error:
        raise CliError(
            f"cannot read the DiracX configuration at {os.environ.get(CONFIG_VARIABLE)}: "
            f"{'; '.join(explain(error))}; check {CONFIG_VARIABLE}"
        ) from error
