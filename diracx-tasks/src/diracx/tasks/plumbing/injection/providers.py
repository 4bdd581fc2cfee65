"""Provides the values of the DiracX placeholders in a worker: databases, settings, configuration, sources.

Only dependencies that some task needs are opened, once per process, and closed in reverse order at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from contextvars import Context
from typing import TYPE_CHECKING, Any, TypeVar

from .._util.tasks import in_own_thread
from ..plugins import load_plugin
from ..sql.databases import database_urls, watch_connections
from .placeholders import (
    CONFIG,
    OPENSEARCH,
    SETTINGS,
    SOURCE,
    SQL,
    Call,
    Family,
    Overrides,
    calls_below,
    family_of,
)

if TYPE_CHECKING:
    from diracx.core.config import Config
    from diracx.core.settings import ServiceSettingsBase
    from diracx.core.sources import AsyncCacheableSource
    from diracx.db.sql.utils import BaseSQLDB


logger = logging.getLogger(__name__)

_Loaded = TypeVar("_Loaded")


@contextlib.asynccontextmanager
async def setup_dependency_overrides(
    task_dependants: Iterable[Any] = (), *, provided: Overrides | None = None
) -> AsyncIterator[dict[Call, Call]]:
    """Open the dependencies of plans, and yield the overrides that provide them; close them with the context.

    Databases come from ``DIRACX_DB_URL_<NAME>`` and ``DIRACX_OS_DB_<NAME>``, settings from their own
    variables, the configuration from ``DIRACX_CONFIG_BACKEND_URL`` (read once before this yields). Without
    plans, all databases and the configuration are opened. The overrides lack dependencies that are not configured
    (see `find_missing_overrides`) and those in `provided`, which are not opened again.

    Raises:
        TaskConfigError: a database URL is malformed.
        Exception: a needed dependency is configured, but cannot be opened or read.
    """
    dependants = list(task_dependants)
    known = provided or {}
    needed = {call for dependant in dependants for call in calls_below(dependant, known)} - known.keys()
    sources = _source_classes(needed) if _owners(needed, SOURCE) else []
    overrides: dict[Call, Call] = {}
    async with AsyncExitStack() as stack:
        if settings := _owners(needed, SETTINGS):
            await _open_settings(settings, overrides, stack)
        if not dependants or _owners(needed, CONFIG):
            await _open_config(overrides)
        databases: dict[type, BaseSQLDB] = {}
        if not dependants or _owners(needed, SQL):
            databases = await _open_sql(needed if dependants else None, overrides, stack)
        for classes in sources:
            _add_source(classes, databases, overrides)
        if not dependants or _owners(needed, OPENSEARCH):
            await _open_opensearch(needed if dependants else None, overrides, stack)
        yield overrides


def _owners(needed: Iterable[Call], family: Family) -> list[Any]:
    """Return the classes of a family whose placeholders are needed, by name."""
    owners = {call.__self__ for call in needed if family_of(call) == family}  # type: ignore[attr-defined]  # bound classmethods
    return sorted(owners, key=lambda owner: str(owner.__qualname__))


async def _open_settings(
    classes: Iterable[type[ServiceSettingsBase]], overrides: dict[Call, Call], stack: AsyncExitStack
) -> None:
    from pydantic import ValidationError

    for cls in classes:
        try:
            settings = cls()
        except Exception as error:  # also of a list that is not JSON, or of a file that a variable names
            problems = str(error)
            if isinstance(error, ValidationError):  # without the values, which may be secret
                problems = "; ".join(
                    f"{'.'.join(map(str, item['loc']))}: {item['msg']}"
                    for item in error.errors(include_input=False, include_context=False, include_url=False)
                )
            logger.warning("%s cannot be read from the environment: %s", cls.__name__, problems)
            continue
        await stack.enter_async_context(settings.lifetime_function())
        overrides[cls.create] = functools.partial(_same, settings)


def _same(value: Any) -> Any:
    return value


async def _open_config(overrides: dict[Call, Call]) -> None:
    from diracx.core.config import ConfigSource
    from diracx.core.exceptions import NotReadyError
    from diracx.core.settings import FactorySettings

    if not FactorySettings().config_backend_url:
        return
    # Both run git, which would block the event loop.
    source: ConfigSource = await in_own_thread(ConfigSource.create)
    await in_own_thread(source.read)

    async def config() -> Config:
        try:
            return await source.read_non_blocking()
        except NotReadyError:  # not read for an hour: wait for it rather than fail the task
            return await in_own_thread(source.read)

    overrides[ConfigSource.create] = config


def _loaded(what: str, load: Callable[[], _Loaded]) -> _Loaded | None:
    """Load a class of an entry point; None if its module cannot be imported, which is logged."""
    try:
        return load_plugin(load)
    except Exception:
        logger.exception("The %s is left out, its class could not be loaded", what)
        return None


async def _open_sql(
    needed: set[Call] | None, overrides: dict[Call, Call], stack: AsyncExitStack
) -> dict[type, BaseSQLDB]:
    from diracx.db.sql.utils import BaseSQLDB

    databases: dict[type, BaseSQLDB] = {}
    for name, url in database_urls().items():
        classes = _loaded(f"database {name}", functools.partial(BaseSQLDB.available_implementations, name)) or []
        if needed is not None and not any(needed & {cls.transaction, cls.no_transaction} for cls in classes):
            continue
        database = classes[0](db_url=url)
        await stack.enter_async_context(database.engine_context())
        watch_connections(database.engine)
        overrides.update(sql_overrides(database, classes))
        databases.update(dict.fromkeys(classes, database))
    return databases


def sql_overrides(database: BaseSQLDB, classes: Iterable[type[BaseSQLDB]] = ()) -> dict[Call, Call]:
    """Return overrides that inject `database` for `classes` (by default for its own class).

    Its ``engine_context`` must be entered before the overrides are used.
    """
    transaction = functools.partial(_transaction, database)
    no_transaction = functools.partial(_same, database)
    overrides: dict[Call, Call] = {}
    for cls in tuple(classes) or (type(database),):
        overrides[cls.transaction] = transaction
        overrides[cls.no_transaction] = no_transaction
    return overrides


async def _transaction(database: BaseSQLDB) -> AsyncIterator[BaseSQLDB]:
    """Commit when the execution succeeded, else roll back; close in any case."""
    await database.__aenter__()
    try:
        yield database
        await database.__aexit__(None, None, None)  # type: ignore[no-untyped-call]  # untyped in diracx-db
    except BaseException as failure:
        await _roll_back(database, failure)
        raise


async def _roll_back(database: BaseSQLDB, failure: BaseException) -> None:
    """Roll back and close, also after a failed commit, where BaseSQLDB 0.7 does neither.

    SQLAlchemy considers the transaction of a failed commit ended, and returns its connection to the pool without a
    rollback. In SQLite it is still open (after a violated deferred constraint), and its rows would be committed
    with those of the next execution: the connection of the driver is rolled back, too.
    """
    try:
        connection = database.conn
    except RuntimeError:  # closed already: the failure came after the commit
        return
    name = type(database).__name__
    try:
        if not connection.invalidated:
            await connection.run_sync(lambda sync_connection: sync_connection.connection.rollback())
    except Exception:
        logger.warning("A connection of %s is discarded", name, exc_info=True)
        await connection.invalidate()
    finally:  # also if this is cancelled
        try:
            await database.__aexit__(type(failure), failure, None)  # type: ignore[no-untyped-call]  # same
        except Exception:  # log only: `failure` is raised, not this error
            logger.exception("A connection of %s could not be closed", name)


async def _open_opensearch(needed: set[Call] | None, overrides: dict[Call, Call], stack: AsyncExitStack) -> None:
    from diracx.core.settings import FactorySettings
    from diracx.db.os.utils import BaseOSDB

    for name, connection in BaseOSDB.available_urls().items():
        classes = _loaded(f"database {name}", functools.partial(BaseOSDB.available_implementations, name)) or []
        if needed is not None and not any(cls.session in needed for cls in classes):
            continue
        database = classes[0](connection_kwargs=connection, global_prefix=FactorySettings().os_global_prefix)
        await stack.enter_async_context(database.client_context())
        session = functools.partial(_session, database)
        overrides.update({cls.session: session for cls in classes})


async def _session(database: Any) -> AsyncIterator[Any]:
    async with database:
        yield database


def _source_classes(needed: set[Call]) -> list[list[type[AsyncCacheableSource[Any]]]]:
    """Group the needed sources by name, best implementation first, and add their databases to `needed`."""
    from diracx.core.extensions import DiracEntryPoint, select_from_extension

    by_name: dict[str, list[Any]] = {}
    for entry_point in select_from_extension(group=DiracEntryPoint.CACHEABLE_SOURCES):
        by_name.setdefault(entry_point.name, []).append(_loaded(f"source {entry_point.name}", entry_point.load))
    groups = list(by_name.values())
    registered = {cls for classes in groups for cls in classes}
    groups += [[cls] for cls in _owners(needed, SOURCE) if cls not in registered]
    # The other classes of a name are no replacement for one that could not be loaded.
    found = [classes for classes in groups if None not in classes and any(cls.create in needed for cls in classes)]
    needed.update(classes[0].db_class.transaction for classes in found)
    return found


def _add_source(
    classes: list[type[AsyncCacheableSource[Any]]],
    databases: dict[type, BaseSQLDB],
    overrides: dict[Call, Call],
) -> None:
    database = databases.get(classes[0].db_class)
    if database is None:
        return
    source = classes[0](db=database)  # type: ignore[call-arg]  # argument of DiracX sources, missing in their base

    async def read() -> Any:
        # In an empty context: the source opens a transaction, which would collide with that of the task on the
        # same database.
        return await asyncio.create_task(source.read(), context=Context())

    overrides.update({cls.create: read for cls in classes})
