"""Column types for arbitrary text and for times, equal on SQLite, MySQL, MariaDB and PostgreSQL.

Characters that one of them refuses (NUL on PostgreSQL, lone surrogates) or silently changes are escaped in stored
and compared values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import DateTime, Dialect, String, Text, TypeDecorator
from sqlalchemy.dialects import mysql

#: Table arguments for MySQL: all characters, and case-sensitive comparison.
UTF8 = {"mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}
_MYSQL = ("mysql", "mariadb")
#: Appended on MySQL to names that end with a blank or with this, as MySQL compares without trailing blanks.
_END = "␠"


def sanitize(text: str, longest: int | None = None) -> str:
    """Escape characters that not all databases accept, and truncate the text with an ellipsis."""
    if not text.isascii() or "\0" in text:
        text = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
    return text if longest is None or len(text) <= longest else text[: longest - 1] + "…"


def truncate(name: str, longest: int) -> str:
    """Escape and truncate a name; if it was changed, it ends with its hash, so that it stays unique."""
    clean = sanitize(name)
    if clean == name and len(clean) <= longest:
        return clean
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{clean[: longest - len(digest) - 1]}~{digest}"


class AnyText(TypeDecorator[str]):
    """Text, escaped by `sanitize` and truncated to `length` characters."""

    impl = String
    cache_ok = True

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.length = length

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else sanitize(value, self.length)


class AnyLongText(TypeDecorator[str]):
    """Text of any length (4 GB on MySQL), escaped by `sanitize`."""

    impl = Text().with_variant(mysql.LONGTEXT(), *_MYSQL)  # TEXT has at most 64 KiB
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else sanitize(value)


class AnyName(AnyText):
    """Names: different names stay different, in case, trailing blanks and length."""

    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        if value is None:
            return None
        if dialect.name in _MYSQL and value.endswith((" ", _END)):
            value += _END
        return truncate(value, self.length)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], str | None] | None:
        # A function, not `process_result_value`, as checks read 100,000 names.
        return _without_end if dialect.name in _MYSQL else None


def _without_end(value: str | None) -> str | None:
    return value[:-1] if value is not None and value.endswith(_END) else value


class UTCDateTime(TypeDecorator[datetime]):
    """Aware datetimes, stored as naive UTC with microseconds.

    (DiracX's own `SmarterDateTime` refuses the dialect name `postgresql`.)
    """

    impl = DateTime().with_variant(
        mysql.DATETIME(fsp=6), *_MYSQL
    )  # the default of MySQL rounds to seconds, also up
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a datetime without a time zone cannot be stored: {value!r}")
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], datetime | None] | None:
        # SQLite stores text, of which a check of 100,000 pilots reads 400,000: this is faster.
        return _from_text if dialect.name == "sqlite" else super().result_processor(dialect, coltype)


def _from_text(value: str | None) -> datetime | None:
    return None if value is None else datetime.fromisoformat(value + "+00:00")
