"""Configured SQL databases (`DIRACX_DB_URL_<NAME>`).

`database_urls` replaces `BaseSQLDB.available_urls`, which in diracx-db 0.7 refuses PostgreSQL and does not name
the variable that is wrong.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Any

from ..exceptions import TaskConfigError

if TYPE_CHECKING:
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import ConnectionPoolEntry

#: A connection is checked before its use if it was unused for longer, which costs a round trip.
_UNUSED_SECONDS = 1.0
PREFIX = "DIRACX_DB_URL_"
_PREFIXES = (PREFIX, "DIRACX_OS_DB_", "DIRACX_SERVICE_DOTENV")
_DRIVERS = ("sqlite+aiosqlite", "mysql+aiomysql", "postgresql+asyncpg", "oracle+oracledb_async")


def may_be_configured() -> bool:
    """Return whether a database, SQL or OpenSearch, may be configured, without imports that take half a second."""
    return any(value and name.startswith(_PREFIXES) for name, value in os.environ.items())


def database_urls(only: str | None = None) -> dict[str, str]:
    """Return the URLs of the installed databases that are configured, by name.

    Args:
        only: return and check this one alone.

    Raises:
        TaskConfigError: names the variable that is not a URL of a database, without its value.
    """
    if not may_be_configured():
        return {}
    from diracx.core.settings import FactorySettings

    urls = {name: url for name, url in FactorySettings().sql_dbs.items() if url and only in (None, name)}
    for name, url in urls.items():
        if not _is_valid(url):
            raise TaskConfigError(
                f"{PREFIX}{name.upper()} is not a valid database URL; write dialect+driver://host/database, as in "
                "mysql+aiomysql://db.example.org/tasks, postgresql+asyncpg://db.example.org/tasks or "
                "sqlite+aiosqlite:////var/lib/tasks.db"
            )
    return urls


async def join_threads(before: Collection[threading.Thread]) -> None:
    """Wait for threads of failed SQLite connections, which call this event loop; not for those of `before`."""
    for thread in {*threading.enumerate()}.difference(before):
        if not thread.name.startswith("asyncio_"):  # not those of the loop
            await asyncio.to_thread(thread.join, 1.0)


def _is_valid(url: str) -> bool:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).drivername in _DRIVERS
    except (ArgumentError, ValueError):
        return False


def watch_connections(engine: AsyncEngine) -> None:
    """Replace connections of the pool that are lost when a transaction begins, after a restart of the server say.

    For aiomysql, also convert the RuntimeError of uvloop for a write to a lost connection to an OperationalError.
    """
    from sqlalchemy import event

    if event.contains(engine.sync_engine, "checkin", _note_use):
        return
    event.listen(engine.sync_engine, "checkin", _note_use)
    event.listen(engine.sync_engine, "checkout", partial(_check_after_idle, engine.dialect))
    if engine.dialect.name in ("mysql", "mariadb"):
        event.listen(engine.sync_engine, "handle_error", _connection_lost)


def _note_use(_connection: object, record: ConnectionPoolEntry) -> None:
    record.info["used_at"] = time.monotonic()


def _check_after_idle(dialect: Any, connection: object, record: ConnectionPoolEntry, _proxy: object) -> None:
    from sqlalchemy.exc import DisconnectionError

    if time.monotonic() - record.info.get("used_at", math.inf) > _UNUSED_SECONDS:
        try:
            dialect.do_ping(connection)
        except Exception as error:
            raise DisconnectionError("lost while it was unused") from error  # the pool opens another one


def _connection_lost(context: ExceptionContext) -> Exception | None:
    from sqlalchemy.exc import OperationalError

    from .._util.retrying import is_write_to_closed

    if not is_write_to_closed(context.original_exception):
        return None
    context.is_disconnect = True
    lost = ConnectionError("the connection was lost")
    return OperationalError(context.statement, None, lost, connection_invalidated=True)
