"""A pytest plugin: SQLite without a thread for each connection, for calls that come one after the other.

The driver changes threads four times for each statement, which takes as long as the statements.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import aiosqlite
import pytest


class _Inline(aiosqlite.Connection):
    """Runs statements where they are awaited; no other task runs meanwhile."""

    async def _execute(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


@pytest.fixture
def inline_sqlite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open all connections to SQLite of a test without a thread: not for tests of concurrent calls."""

    def connect(database: str, **kwargs: Any) -> aiosqlite.Connection:
        return _Inline(lambda: sqlite3.connect(database, **kwargs | {"check_same_thread": False}), 64)

    monkeypatch.setattr(aiosqlite, "connect", connect)
