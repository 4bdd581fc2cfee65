"""A pytest plugin: database servers of the tests' own, on free ports, from the programs that are installed.

`mariadb_server` and `postgresql_server` run for the session; a test that stops one must start it again, or
uses `stoppable`, which does. `empty_database` makes a database there. What is not installed is skipped, with
a line that says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from diracx.tasks.testing.server import free_port

from support.server_processes import paused, wait_until_it_responds

_QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
_SECONDS = 60


class SqlServer:
    """A private server, which can be killed and started again on the same port with the same data."""

    def __init__(self, scheme: str, user: str, data: Path, maintenance: str = "") -> None:
        port = free_port()
        self._data = data
        self.url = f"{scheme}://{user}@127.0.0.1:{port}"
        """Without a database's name."""
        self.port = port
        self._maintenance = maintenance
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> tuple[list[str], dict[str, Any]]:
        """Return the command that runs the server in the foreground, and the arguments of its start."""
        raise NotImplementedError

    def start(self) -> None:
        """Start it, if it does not run; return when it responds."""
        if self._process is not None:
            return
        command, how = self.command()
        with (self._data / "log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd="/", stdout=log, stderr=log, **how)
        wait_until_it_responds(self._process, self._responds, self._data / "log", _SECONDS)

    def kill(self) -> None:
        """End it as a power cut would."""
        process, self._process = self._process, None
        if process is not None:
            self.end(process)

    def frozen(self) -> contextlib.AbstractContextManager[None]:
        """Context in which it accepts connections and does not respond."""
        assert self._process is not None
        return paused(self._process.pid)

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """End the process and wait for it."""
        process.kill()
        process.wait(_SECONDS)

    def _responds(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    async def create_database(self, options: str = "") -> str:
        """URL of a new, empty database.

        Args:
            options: how else than by default, as `CREATE DATABASE` wants it.
        """
        from sqlalchemy import text
        from sqlalchemy.ext.asyncio import create_async_engine

        name = f"t{os.urandom(6).hex()}"
        # PostgreSQL creates databases only outside a transaction, from within one that exists.
        engine = create_async_engine(f"{self.url}/{self._maintenance}", isolation_level="AUTOCOMMIT")
        deadline = time.monotonic() + _SECONDS
        while True:  # it may take connections before it takes statements
            try:
                async with engine.connect() as connection:
                    await connection.execute(text(f"CREATE DATABASE {name} {options}"))
                break
            except Exception:
                if time.monotonic() > deadline:
                    raise
        await engine.dispose()
        return f"{self.url}/{name}"


class MariaDb(SqlServer):
    """MariaDB in a directory."""

    def __init__(self, data: Path) -> None:
        super().__init__("mysql+aiomysql", "root", data)  # over TCP, root may come from 127.0.0.1
        user = _give(data, "mysql")
        self._common = [
            *([f"--user={user}"] if user else []),
            f"--datadir={data}/data",
            # Of its own: at its start each server clears it of what it takes for its own old temporary tables.
            f"--tmpdir={data}",
            # There are too few of them for many servers on one machine.
            "--innodb-use-native-aio=0",
        ]
        install = ["mariadb-install-db", "--no-defaults", *self._common]
        done = subprocess.run(
            [*install, "--auth-root-authentication-method=normal"],
            check=False,
            cwd="/",
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def command(self) -> tuple[list[str], dict[str, Any]]:
        options = [
            f"--socket={self._data}/socket",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            "--skip-name-resolve",
            "--innodb-flush-log-at-trx-commit=2",  # kept when the process is killed; no fsync
        ]
        return ["mariadbd", "--no-defaults", *self._common, *options], {}


class PostgreSql(SqlServer):
    """PostgreSQL in a directory."""

    def __init__(self, binaries: Path, data: Path) -> None:
        super().__init__("postgresql+asyncpg", "pilots", data, maintenance="postgres")
        self._binaries = binaries
        user = _give(data, "postgres")  # the server refuses to run as root
        self._how: dict[str, Any] = {"user": user} if user else {}
        initdb = [binaries / "initdb", "-D", data / "data", "-A", "trust", "-U", "pilots", "-E", "UTF8"]
        subprocess.run(initdb, check=True, cwd="/", **self._how, **_QUIET)

    def command(self) -> tuple[list[str], dict[str, Any]]:
        settings = {"port": self.port, "unix_socket_directories": self._data, "listen_addresses": "127.0.0.1"}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [str(self._binaries / "postgres"), "-D", f"{self._data}/data", "-F", *options], self._how

    def end(self, process: subprocess.Popen[bytes]) -> None:
        # SIGQUIT takes its children with it, without a clean end. SIGKILL would leave them.
        process.send_signal(signal.SIGQUIT)
        process.wait(_SECONDS)


def _give(directory: Path, user: str) -> str | None:
    """Give the directory to a server that does not run as root; None: not root."""
    if os.geteuid() != 0:
        return None
    shutil.chown(directory, user)
    return user


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """Not below pytest's own, which each new run of pytest closes to other users than its own."""
    with tempfile.TemporaryDirectory(prefix="diracx-sql-") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[SqlServer]:
    """MariaDB."""
    pytest.importorskip("aiomysql")
    if (reason := servers.obstacle("MariaDB")) is not None:
        pytest.skip(reason)
    with _directory() as data:
        yield from _running(MariaDb(data))


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[SqlServer]:
    """PostgreSQL."""
    pytest.importorskip("asyncpg")
    if (reason := servers.obstacle("PostgreSQL")) is not None:
        pytest.skip(reason)
    with _directory() as data:
        yield from _running(PostgreSql(servers.postgresql(), data))


def _running(server: SqlServer) -> Iterator[SqlServer]:
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def stoppable() -> Iterator[Callable[[SqlServer], SqlServer]]:
    """Lends a server to a test that stops it: it runs again afterwards, whatever happened."""
    lent: list[SqlServer] = []

    def lend(server: SqlServer) -> SqlServer:
        lent.append(server)
        return server

    yield lend
    for server in lent:
        server.start()


@pytest.fixture
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Awaitable[str]]:
    """`await empty_database("sqlite" | "mariadb" | "postgresql")` is the URL of a new database.

    A second argument are options of `CREATE DATABASE`.
    """

    async def create(kind: str, options: str = "") -> str:
        if kind == "sqlite":
            return f"sqlite+aiosqlite:///{tmp_path}/{os.urandom(4).hex()}.db"
        server: SqlServer = request.getfixturevalue(f"{kind}_server")
        return await server.create_database(options)

    return create


#: Kind of server, options of CREATE DATABASE, end of the URL.
_DATABASES = {
    "sqlite": ("sqlite", "", ""),
    "mariadb": ("mariadb", "", ""),
    "mariadb latin1": ("mariadb", "CHARACTER SET latin1 COLLATE latin1_swedish_ci", ""),
    "mariadb latin1 client": ("mariadb", "CHARACTER SET latin1", "?charset=latin1"),
    "postgresql": ("postgresql", "", ""),
}


@pytest.fixture(params=_DATABASES)
async def any_database(request: pytest.FixtureRequest, empty_database: Callable[..., Awaitable[str]]) -> str:
    """URL of an empty database of each kind, including limited character sets."""
    kind, options, end = _DATABASES[request.param]
    return await empty_database(kind, options) + end
