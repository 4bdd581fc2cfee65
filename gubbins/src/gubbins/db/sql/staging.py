"""Send any number of rows to the server as one bound parameter.

A list of 100,000 ids is too long for bound parameters (SQLite takes 32,766, PostgreSQL 65,535), and a
statement per chunk is not a constant number of statements (P62). All three databases read JSON, each with a
function of its own; this module is the only place that knows which.
"""

from __future__ import annotations

__all__ = ["portions", "staged"]

import json
from collections.abc import Iterable, Iterator

from diracx.tasks.plumbing.sql.types import storable
from sqlalchemy import BigInteger, String, bindparam, text
from sqlalchemy.sql.selectable import Subquery

from .schema import MAX_REASON_CHARS

_READERS = {
    # LIMIT -1 keeps SQLite from merging this into the statement around it, where it would read the whole list
    # again for each pilot.
    "sqlite": (
        "SELECT json_extract(value, '$[0]') AS id, json_extract(value, '$[1]') AS reason "
        "FROM json_each(:staged) LIMIT -1"
    ),
    "postgresql": (
        "SELECT CAST(value ->> 0 AS BIGINT) AS id, value ->> 1 AS reason "
        "FROM json_array_elements(CAST(:staged AS JSON)) AS pair(value)"
    ),
    # Else its text is in the character set of the database.
    "mysql": (
        "SELECT pair.id, pair.reason FROM JSON_TABLE(:staged, '$[*]' COLUMNS (id BIGINT PATH '$[0]', "
        "reason TEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PATH '$[1]')) AS pair"
    ),
}
_READERS["mariadb"] = _READERS["mysql"]


#: Servers refuse packets of 16 MB by default.
_LARGEST_PAYLOAD_BYTES = 4 << 20


def portions(rows: Iterable[tuple[int, str | None]]) -> Iterator[list[tuple[int, str | None]]]:
    """These rows in lists that fit a packet: all in one, unless 100,000 of them have long reasons."""
    portion: list[tuple[int, str | None]] = []
    size = 0
    for row in rows:
        reason = row[1]
        # In ASCII a character takes 12 bytes at most, and drivers escape each backslash.
        bytes_ = 24 + (0 if reason is None else len(reason) * (2 if reason.isascii() else 14))
        if portion and size + bytes_ > _LARGEST_PAYLOAD_BYTES:
            yield portion
            portion, size = [], 0
        portion.append(row)
        size += bytes_
    if portion:
        yield portion


def staged(dialect: str, rows: Iterable[tuple[int, str | None]]) -> Subquery:
    """A derived table `id, reason` of these rows, to join with.

    `dialect` is SQLAlchemy's name of it. A row without a reason yields NULL.
    """
    payload = json.dumps(
        [(id,) if reason is None else (id, storable(reason, MAX_REASON_CHARS)) for id, reason in rows]
    )
    statement = text(_READERS[dialect]).bindparams(bindparam("staged", payload, String))
    return statement.columns(id=BigInteger, reason=String).subquery("staged_rows")
