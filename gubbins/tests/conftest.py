"""Databases of the tests: SQLite files always, PostgreSQL where its programs are installed."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import create_async_engine

from gubbins.db.sql import MyPilotDB


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path}/pilots.db"


@pytest.fixture(scope="session")
def postgresql_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A private server on a free port; yields the URL without the database's name."""
    pytest.importorskip("asyncpg")
    candidates = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if os.name == "posix" else []
    where = shutil.which("initdb") or (candidates and candidates[-1] / "initdb")
    if not where:
        pytest.skip("PostgreSQL is not installed")
    binaries = Path(where).resolve().parent
    data = tmp_path_factory.mktemp("postgres")
    as_user: dict[str, str] = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        as_user = {"user": "postgres"}
        shutil.chown(data, "postgres")
        _open_path_to(data)
    port = _free_port()
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    initdb = [binaries / "initdb", "-D", data / "data", "-A", "trust", "-U", "pilots", "-E", "UTF8"]
    subprocess.run(initdb, check=True, cwd="/", **as_user, **quiet)
    options = f"-p {port} -k {data} -c listen_addresses=127.0.0.1 -c fsync=off"
    start = [binaries / "pg_ctl", "-D", data / "data", "-o", options, "-w", "start"]
    subprocess.run(start, check=True, cwd="/", **as_user, **quiet)
    yield f"postgresql+asyncpg://pilots@127.0.0.1:{port}"
    stop = [binaries / "pg_ctl", "-D", data / "data", "-m", "immediate", "stop"]
    subprocess.run(stop, check=False, cwd="/", **as_user, **quiet)


@pytest.fixture(scope="session")
def mariadb_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A private server on a free port; yields the URL without the database's name."""
    pytest.importorskip("aiomysql")
    if shutil.which("mariadbd") is None:
        pytest.skip("MariaDB is not installed")
    data = tmp_path_factory.mktemp("mariadb")
    user = []
    if os.geteuid() == 0:
        user = ["--user=mysql"]
        shutil.chown(data, "mysql")
        _open_path_to(data)
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    install = ["mariadb-install-db", "--no-defaults", *user, f"--datadir={data}/data"]
    subprocess.run([*install, "--auth-root-authentication-method=normal"], check=True, **quiet)
    port = _free_port()
    server = subprocess.Popen(
        [
            "mariadbd",
            "--no-defaults",
            *user,
            f"--datadir={data}/data",
            f"--socket={data}/socket",
            f"--port={port}",
            "--bind-address=127.0.0.1",
            "--skip-name-resolve",
            "--innodb-flush-log-at-trx-commit=0",
        ],
        **quiet,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, "MariaDB did not start"
            assert time.monotonic() < deadline, "MariaDB does not answer"
            time.sleep(0.05)
        # Over TCP it is 127.0.0.1 that root may come from.
        yield f"mysql+aiomysql://root@127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _open_path_to(directory: Path) -> None:
    """Let a server that does not run as root get to its directory."""
    for parent in directory.parents:
        with contextlib.suppress(OSError):
            parent.chmod(parent.stat().st_mode | 0o011)


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
async def db_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database on each kind of server."""
    if request.param == "sqlite":
        return str(request.getfixturevalue("sqlite_url"))
    server = str(request.getfixturevalue(f"{request.param}_server"))
    name = f"t{os.urandom(6).hex()}"
    # PostgreSQL creates databases only outside a transaction, from within one that exists.
    engine = create_async_engine(
        f"{server}/{'postgres' if request.param == 'postgresql' else ''}", isolation_level="AUTOCOMMIT"
    )
    async with engine.connect() as connection:
        await connection.execute(text(f"CREATE DATABASE {name}"))
    await engine.dispose()
    return f"{server}/{name}"


@pytest.fixture
async def db(db_url: str) -> AsyncIterator[MyPilotDB]:
    """A pilot database with its tables, not in a transaction."""
    database = MyPilotDB(db_url)
    async with database.engine_context():
        await database.create_tables()
        yield database


@pytest.fixture
async def sqlite_db(sqlite_url: str) -> AsyncIterator[MyPilotDB]:
    """The same, on SQLite only: for tests in which the kind of server makes no difference."""
    database = MyPilotDB(sqlite_url)
    async with database.engine_context():
        await database.create_tables()
        yield database


@pytest.fixture
def count_statements() -> Callable[[MyPilotDB], contextlib.AbstractContextManager[list[str]]]:
    """`with count_statements(db) as statements:` collects what is sent to the server."""

    @contextlib.contextmanager
    def counting(database: MyPilotDB) -> Iterator[list[str]]:
        statements: list[str] = []

        def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            statements.append(statement)

        engine = database.engine.sync_engine
        event.listen(engine, "before_cursor_execute", note)
        try:
            yield statements
        finally:
            event.remove(engine, "before_cursor_execute", note)

    return counting


@pytest.fixture(scope="session")
def test_sandbox_settings() -> Any:
    """In place of the one of `diracx.testing`, which starts a simulated S3: the client factory wants to have
    settings for every service, and the pilot system has no sandboxes."""
    from diracx.core.settings import SandboxStoreSettings

    return SandboxStoreSettings(bucket_name="none", s3_client_kwargs={}, auto_create_bucket=False)
