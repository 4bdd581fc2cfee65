"""What a process finds in its environment: databases, the DiracX configuration, the configuration of tasks."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import CliError

if TYPE_CHECKING:
    from diracx.core.config import Config
    from diracx.db.sql.utils import BaseSQLDB

    from ..plumbing.config import TasksConfig
    from ..plumbing.factory import TaskRegistry
    from ..plumbing.injection import Plan
    from ..plumbing.persistence import TaskDB

logger = logging.getLogger(__package__)

CONFIG_VARIABLE = "DIRACX_CONFIG_BACKEND_URL"
TASK_DB_VARIABLE = "DIRACX_DB_URL_TASKDB"
_DATABASE_PREFIX = "DIRACX_DB_URL_"
_ANSWER_SECONDS = 5.0


# --- databases ----------------------------------------------------------------------------------------------


async def check_databases(plans: Iterable[Plan]) -> None:
    """Make sure that the configured databases these plans need answer and have their tables.

    Raises:
        CliError: naming the database that does not.
    """
    from ..plumbing.sentinels import SQL, calls_below, family_of

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
    if not os.environ.get(TASK_DB_VARIABLE):
        logger.warning(
            "no database for dead letters: they wait in Redis; set %s to keep them in SQL", TASK_DB_VARIABLE
        )
        yield None
        return
    url = _database_urls()["TaskDB"]
    async with _checked("TaskDB", _database_classes("TaskDB")[0], url) as database:
        yield database


def _database_urls() -> dict[str, str]:
    """URL by database name, from DIRACX_DB_URL_<NAME>."""
    from diracx.db.sql.utils import BaseSQLDB

    logging.getLogger("diracx.db.sql.utils.base").setLevel(logging.CRITICAL)  # it is reported below
    try:
        return BaseSQLDB.available_urls()
    except Exception as error:
        # Which one it was is not said by the library, and its message has the password.
        names = sorted(name for name in os.environ if name.startswith(_DATABASE_PREFIX))
        which = ", ".join(names) if len(names) == 1 else f"one of {', '.join(names)}"
        raise CliError(
            f"{which} is not a valid database URL; write dialect+driver://host/database, as in "
            "mysql+aiomysql://db.example.org/tasks or sqlite+aiosqlite:////var/lib/tasks.db"
        ) from error


def _database_classes(name: str) -> list[type[Any]]:
    from diracx.db.sql.utils import BaseSQLDB

    try:
        return BaseSQLDB.available_implementations(name)
    except Exception as error:
        raise CliError(f"the class of the database {name} cannot be loaded: {error}") from error


@asynccontextmanager
async def _checked(name: str, database_class: type[BaseSQLDB], url: str) -> AsyncIterator[Any]:
    """The database, open, after it answered and showed its tables."""
    from sqlalchemy import inspect

    variable = _DATABASE_PREFIX + name.upper()
    try:
        database = database_class(db_url=url)
    except Exception as error:
        # The error of a bad URL shows it in full.
        raise CliError(
            f"{variable} cannot be used ({type(error).__name__}); check its dialect, driver and address"
        ) from error
    async with database.engine_context():
        before = set(threading.enumerate())
        try:
            async with asyncio.timeout(_ANSWER_SECONDS), database.engine.connect() as connection:
                there = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
        except TimeoutError as error:
            raise CliError(
                f"the database {name} does not answer within {_ANSWER_SECONDS:g} s; check {variable}"
            ) from error
        except Exception as error:
            # The thread of an aiosqlite connection that failed still has a last word for this event loop.
            for thread in set(threading.enumerate()) - before:
                if not thread.name.startswith("asyncio_"):  # those of the loop itself stay
                    await asyncio.to_thread(thread.join, 1.0)
            cause = getattr(error, "orig", None) or error  # without the SQL statement
            raise CliError(f"cannot reach the database {name}: {cause}; check {variable}") from error
        known = {table.casefold() for table in there}
        missing = sorted(table for table in database.metadata.tables if table.casefold() not in known)
        if missing:
            raise CliError(
                f"the database {name} is not initialised (no table {', '.join(missing)}); "
                f"run `python -m diracx.db init-sql` with the same {variable}"
            )
        yield database


# --- configuration ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """What the operator has written."""

    tasks: TasksConfig
    vos: list[str] | None
    """None where there is no DiracX configuration."""


def read_configuration(registry: TaskRegistry) -> Configuration:
    """The configuration of tasks, and the VOs. Names in it that nothing goes by are logged as warnings.

    Raises:
        CliError: when it cannot be read, or is wrong.
    """
    from ..plumbing.config import unknown_names

    config = _diracx_config()
    vos = None if config is None else sorted(config.registry)
    tasks = _tasks_config(config)
    for line in unknown_names(tasks, registry.keys(), list(tasks.vo_overrides) if vos is None else vos):
        logger.warning("configuration of tasks: %s", line)
    return Configuration(tasks, vos)


def tasks_config() -> TasksConfig:
    """The configuration of tasks alone, for whoever submits.

    Raises:
        CliError: when it cannot be read, or is wrong.
    """
    return _tasks_config(_diracx_config())


def _tasks_config(config: Config | None) -> TasksConfig:
    from ..plumbing.config import load_tasks_config
    from ..plumbing.exceptions import TaskConfigError

    try:
        return load_tasks_config(config=config)
    except TaskConfigError as error:
        raise CliError(f"the configuration of tasks is wrong: {'; '.join(str(error).splitlines())}") from error


def _diracx_config() -> Config | None:
    """The DiracX configuration, None when DIRACX_CONFIG_BACKEND_URL is not set."""
    url = os.environ.get(CONFIG_VARIABLE)
    if not url:
        return None
    try:
        from diracx.core.config import ConfigSource

        return ConfigSource.create_from_url(backend_url=url).read()
    except Exception as error:
        raise CliError(
            f"cannot read the DiracX configuration at {url}: {_reason(error)}; check {CONFIG_VARIABLE}"
        ) from error


def _reason(error: Exception) -> str:
    """Why there is no configuration. What git printed comes with its command line; the last line says it."""
    if isinstance(error, KeyError):
        return f"there is no kind of source {error}"
    printed = getattr(error, "stderr", b"")
    text = printed.decode(errors="replace") if isinstance(printed, bytes) and printed else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
