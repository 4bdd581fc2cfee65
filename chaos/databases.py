"""Database of dead letters in the chaos tests: SQLite, or a server behind a link, and its failures."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import servers
from support import sql_servers

from .links import Link
from .plan import Disturbance
from .processes import History
from .redis_servers import is_under_way


class Database:
    """`url` is for the processes, behind the link; `own_url` leads there directly."""

    def __init__(self, kind: str, directory: Path, history: History) -> None:
        self._kind, self._history = kind, history
        self._server: sql_servers.SqlServer | None = None
        self._link: Link | None = None
        self._busy: asyncio.Task[None] | None = None
        self._data: tempfile.TemporaryDirectory[str] | None = None
        self.own_url = self.url = f"sqlite+aiosqlite:///{directory}/taskdb.sqlite"

    async def start(self) -> None:
        if self._kind != "sqlite":
            await asyncio.to_thread(self._start_server)
            assert self._server is not None
            self.own_url = await self._server.create_database()
            self._link = Link("database", self.own_url, self._history)
            user = self.own_url.partition("://")[2].partition("@")[0]
            self.url = self._link.url.replace("://", f"://{user}@")

    def _start_server(self) -> None:
        # Not below the run's own directory, which the server's user may not enter.
        self._data = tempfile.TemporaryDirectory(prefix="chaos-sql-")
        path = Path(self._data.name)
        mariadb = self._kind == "mariadb"
        self._server = sql_servers.MariaDb(path) if mariadb else sql_servers.PostgreSql(servers.postgresql(), path)
        self._server.start()

    def strike(self, disturbance: Disturbance) -> bool:
        """Begin the disturbance, unless one is under way."""
        if self._link is None or self._link.disturbed or is_under_way(self._busy):
            return False
        if "link" in disturbance.what:
            self._link.strike(disturbance)
        else:
            self._busy = asyncio.create_task(self._without_server(disturbance))
        return True

    async def _without_server(self, disturbance: Disturbance) -> None:
        assert self._server is not None
        if disturbance.what.startswith("pause"):
            with self._server.frozen():
                await asyncio.sleep(disturbance.seconds)
        else:
            self._server.kill()
            await asyncio.sleep(disturbance.seconds)
            await asyncio.to_thread(self._server.start)

    def look(self) -> None:
        if self._link is not None:
            self._link.look()

    async def settle(self) -> None:
        """Let every disturbance end."""
        if self._link is not None:
            self._link.look(end=True)
        if self._busy is not None:
            await self._busy

    def stop(self) -> None:
        if self._link is not None:
            self._link.stop()
        if self._server is not None:
            self._server.kill()
        if self._data is not None:
            self._data.cleanup()


def obstacle(kind: str) -> str | None:
    """Return why this kind of database cannot run here; None: it can."""
    names = {"mariadb": "MariaDB", "postgresql": "PostgreSQL"}
    return servers.obstacle(names[kind]) if kind in names else None
