"""Clock of an SQL server, for time stamps from several hosts."""

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
#: Smaller differences are ignored, as they may be caused by the latency of the query.
_TOLERANCE = timedelta(seconds=1)


class DatabaseClock:
    """Time of the database, without a query for each time stamp."""

    def __init__(self) -> None:
        self.ahead = timedelta(0)
        """Offset of the clock of the database from that of this host."""

    def now(self) -> datetime:
        """Return the current time of the database in UTC."""
        return datetime.now(UTC) + self.ahead

    def synchronize(self, engine: AsyncEngine) -> None:
        """Measure the offset at each new connection of the engine; not for SQLite, which has no clock."""
        query = _QUERIES.get(engine.dialect.name)
        if query is None:
            return
        from sqlalchemy import event

        def measure(connection: Any, _record: Any) -> None:
            before = datetime.now(UTC)
            cursor = connection.cursor()
            try:
                cursor.execute(query)
                [[server_time]] = cursor.fetchall()
            finally:
                cursor.close()
                connection.rollback()
            ahead = server_time.replace(tzinfo=UTC) - before - (datetime.now(UTC) - before) / 2
            self.ahead = ahead if abs(ahead) > _TOLERANCE else timedelta(0)

        event.listen(engine.sync_engine, "connect", measure)
