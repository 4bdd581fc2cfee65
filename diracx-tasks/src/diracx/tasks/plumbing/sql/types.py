"""Columns for text of any origin, the same on SQLite, MySQL, MariaDB and PostgreSQL.

What one of them refuses (NUL on PostgreSQL, half a surrogate pair everywhere) or silently changes is escaped on
its way in, in values that are stored and in values that are compared with alike.
"""

from __future__ import annotations

__all__ = ["UTF8", "AnyLongText", "AnyName", "AnyText", "sanitize", "truncate"]

import hashlib
from collections.abc import Callable
from typing import Any

from sqlalchemy import Dialect, String, Text, TypeDecorator
from sqlalchemy.dialects import mysql

#: Arguments of a table: any character, and names that differ in case only are two. Neither is MySQL's default.
UTF8 = {"mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}
_MYSQL = ("mysql", "mariadb")
#: MySQL compares without trailing blanks: a name that ends in one, or in this, has this appended there.
_END = "␠"


def sanitize(text: str, longest: int | None = None) -> str:
    """Convert a text to characters that every database takes; a long one is cut, and ends in an ellipsis."""
    if not text.isascii() or "\0" in text:
        text = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
    return text if longest is None or len(text) <= longest else text[: longest - 1] + "…"


def truncate(name: str, longest: int) -> str:
    """Fit a name to its column; one that is changed ends in its hash, so that different names stay different."""
    clean = sanitize(name)
    if clean == name and len(clean) <= longest:
        return clean
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{clean[: longest - len(digest) - 1]}~{digest}"


class AnyText(TypeDecorator[str]):
    """Text for people: escaped as by `sanitize`, and cut to `length` characters."""

    impl = String
    cache_ok = True

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.length = length

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else sanitize(value, self.length)


class AnyLongText(TypeDecorator[str]):
    """Text of any length (4 GB on MySQL), escaped as by `sanitize`."""

    impl = Text().with_variant(mysql.LONGTEXT(), *_MYSQL)  # its plain TEXT ends at 64 KiB
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else sanitize(value)


class AnyName(TypeDecorator[str]):
    """Column of names: different names are never equal, whatever their case, end or length."""

    impl = String
    cache_ok = True

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.length = length

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        if value is None:
            return None
        if dialect.name in _MYSQL and value.endswith((" ", _END)):
            value += _END
        return truncate(value, self.length)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], str | None] | None:
        # A check reads the names of 100,000 pilots.
        return _without_end if dialect.name in _MYSQL else None


def _without_end(value: str | None) -> str | None:
    return value[:-1] if value is not None and value.endswith(_END) else value
