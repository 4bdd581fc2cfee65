"""A pytest plugin: databases that cannot be used, and what is to be said about each."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from diracx.tasks.plumbing.sql.databases import join_threads
from diracx.tasks.plumbing.sql.migrations import Migrations
from diracx.tasks.testing.server import free_port
from sqlalchemy.engine import make_url

PASSWORD = "sesame"  # must not be shown


@dataclass(frozen=True)
class TroubledDatabase:
    """A database that cannot be used."""

    url: str
    says: tuple[str, ...]
    """Parts of the error line."""


Make = Callable[[Migrations, Path, Callable[..., Awaitable[str]]], Awaitable[str]]


def _file(path: Path) -> str:
    return f"sqlite+aiosqlite:///{path}"


async def _no_directory(_migrations: Migrations, directory: Path, _empty: object) -> str:
    return _file(directory / "nothing" / "x.db")


async def _a_directory(_migrations: Migrations, directory: Path, _empty: object) -> str:
    return _file(directory)


async def _another_file(_migrations: Migrations, directory: Path, _empty: object) -> str:
    (directory / "another").write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    return _file(directory / "another")


async def _without_a_column(migrations: Migrations, directory: Path, _empty: object) -> str:
    await migrations.upgrade(_file(directory / "old.db"))
    with closing(sqlite3.connect(directory / "old.db")) as connection:
        for table in migrations.metadata.sorted_tables:
            for column in ("BanReason", "LastError", "Detail"):
                if column in {each.name for each in table.columns}:
                    connection.execute(f'ALTER TABLE "{table.name}" DROP COLUMN "{column}"')
        connection.commit()
    return _file(directory / "old.db")


def _without_tables(kind: str) -> Make:
    async def make(_migrations: Migrations, _directory: Path, empty: Callable[..., Awaitable[str]]) -> str:
        return await empty(kind)

    return make


def _changed(kind: str, **changes: str) -> Make:
    async def make(_migrations: Migrations, _directory: Path, empty: Callable[..., Awaitable[str]]) -> str:
        url = make_url(await empty(kind)).set(**changes)  # type: ignore[arg-type]  # its fields by name
        return url.render_as_string(hide_password=False)

    return make


def _down(scheme: str, host: str = "127.0.0.1") -> Make:
    async def make(*_: object) -> str:
        return f"{scheme}://pilots:{PASSWORD}@{host}:{free_port()}/pilots"

    return make


def _url(scheme: str, rest: str) -> Make:
    async def make(*_: object) -> str:
        return f"{scheme}://pilots:{PASSWORD}@{rest}"

    return make


_INIT = ("is not initialised", "init`")
_TROUBLES: dict[str, tuple[Make, tuple[str, ...]]] = {
    "sqlite: no such directory": (_no_directory, ("cannot be opened",)),
    "sqlite: a directory": (_a_directory, ("cannot be opened",)),
    "sqlite: another file": (_another_file, ("is not an SQLite database",)),
    "sqlite: no tables": (_without_tables("sqlite"), _INIT),
    "sqlite: an older version": (_without_a_column, ("is of an older version", "db upgrade`")),
    "mariadb: down": (_down("mysql+aiomysql"), ("cannot reach",)),
    "mariadb: wrong password": (_changed("mariadb", password=PASSWORD), ("the user or the password",)),
    "mariadb: no such database": (_changed("mariadb", database="nothing"), ("does not exist",)),
    "mariadb: no tables": (_without_tables("mariadb"), _INIT),
    "postgresql: down": (_down("postgresql+asyncpg"), ("cannot reach",)),
    "postgresql: no such user": (_changed("postgresql", username="nobody"), ("the user or the password",)),
    "postgresql: no such database": (_changed("postgresql", database="nothing"), ("does not exist",)),
    "postgresql: no tables": (_without_tables("postgresql"), _INIT),
}
_UNUSABLE = {
    "a port out of range": "127.0.0.1:99999/pilots",
    "an unknown option": "127.0.0.1:1/pilots?foo=bar",
    "a host that is no name": "a..b/pilots",
}
for _kind, _scheme in (("mariadb", "mysql+aiomysql"), ("postgresql", "postgresql+asyncpg")):
    _TROUBLES[f"{_kind}: down, by name"] = (_down(_scheme, "localhost"), ("cannot reach",))
    for _what, _rest in _UNUSABLE.items():
        _TROUBLES[f"{_kind}: {_what}"] = (_url(_scheme, _rest), ("no usable URL", "correct"))
SQLITE_TROUBLES = [name for name in _TROUBLES if name.startswith("sqlite")]

Troubled = Callable[[Migrations], Awaitable[TroubledDatabase]]


@pytest.fixture(params=_TROUBLES)
async def troubled_database(
    request: pytest.FixtureRequest, empty_database: Callable[..., Awaitable[str]], tmp_path: Path
) -> AsyncIterator[Troubled]:
    """`await troubled_database(Class.migrations)` is a database of that class that cannot be used."""
    kind = request.param.partition(":")[0]
    if request.param.endswith(("user", "password", "database", "tables", "version")) and kind != "sqlite":
        request.getfixturevalue(f"{kind}_server")
    make, says = _TROUBLES[request.param]

    async def troubled(migrations: Migrations) -> TroubledDatabase:
        variable = (f"DIRACX_DB_URL_{migrations.database.upper()}",)
        return TroubledDatabase(await make(migrations, tmp_path, empty_database), says + variable)

    before = set(threading.enumerate())
    yield troubled
    await join_threads(before)
