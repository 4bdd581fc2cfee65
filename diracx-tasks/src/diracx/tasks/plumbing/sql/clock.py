"""Clock of a SQL server, for timestamps that several machines write into one database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

_MYSQL = "SELECT UTC_TIMESTAMP(6)"
_QUERIES = {
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
    "postgresql": "SELECT clock_timestamp() AT TIME ZONE 'UTC'",
}
#: Clocks that agree so far are taken to agree: how long the answer takes is no reason to go back and forth.
_AGREE = timedelta(seconds=1)


class DatabaseClock:
    """Time of the database without a query each time."""

    def __init__(self) -> None:
        self._ahead = timedelta(0)

    def now(self) -> datetime:
        """Return the present time in UTC."""
        return datetime.now(UTC) + self._ahead

    def follow(self, engine: AsyncEngine) -> None:
        """Poll the server's clock whenever a connection is made. SQLite has no clock but ours."""
        query = _QUERIES.get(engine.dialect.name)
        if query is None:
            return
        from sqlalchemy import event

        def look(connection: Any, _record: Any) -> None:
            before = datetime.now(UTC)
            cursor = connection.cursor()
            try:
                cursor.execute(query)
                [[there]] = cursor.fetchall()
            finally:
                cursor.close()
                connection.rollback()
            ahead = there.replace(tzinfo=UTC) - before - (datetime.now(UTC) - before) / 2
            self._ahead = ahead if abs(ahead) > _AGREE else timedelta(0)

        event.listen(engine.sync_engine, "connect", look)
