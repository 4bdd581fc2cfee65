"""Query plans of the statements of a block: the tables they read, and by which index."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine


@dataclass(frozen=True)
class Reading:
    """One table in one statement."""

    table: str
    whole: bool
    """True if all rows, or a whole index, may be read."""
    how: str
    """As the server says it."""
    statement: str


@asynccontextmanager
async def plans(engine: AsyncEngine) -> AsyncIterator[list[Reading]]:
    """The list is filled at the end of the block."""
    sent: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, many: bool) -> None:
        sent.append((statement, parameters[0] if many else parameters))

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    readings: list[Reading] = []
    try:
        yield readings
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", note)
    async with engine.connect() as connection:
        for statement, parameters in sent:
            if statement.startswith("SET "):  # decides over the plans of its transaction
                await connection.exec_driver_sql(statement)
            elif statement.lstrip("( ").startswith(("SELECT", "UPDATE", "DELETE", "INSERT", "WITH")):
                readings.extend(await _explain(connection, statement, parameters))
        await connection.rollback()


async def _explain(connection: AsyncConnection, statement: str, parameters: Any) -> list[Reading]:
    dialect = connection.dialect.name
    prefix = {"sqlite": "EXPLAIN QUERY PLAN", "postgresql": "EXPLAIN (FORMAT JSON)"}.get(dialect, "EXPLAIN")
    rows = (await connection.exec_driver_sql(f"{prefix} {statement}", parameters)).mappings().all()
    if dialect == "sqlite":
        found = _sqlite([row["detail"] for row in rows])
    elif dialect == "postgresql":
        plan = rows[0]["QUERY PLAN"]
        found = _postgresql((json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"])
    else:
        found = _mysql([dict(row) for row in rows], limited=" LIMIT " in statement)
    return [Reading(table, whole, how, statement) for table, whole, how in found]


def _sqlite(details: list[str]) -> Iterator[tuple[str, bool, str]]:
    for detail in details:
        verb, _, rest = detail.partition(" ")
        if verb in ("SCAN", "SEARCH"):
            yield rest.split(" ")[0], verb == "SCAN", detail


def _mysql(rows: list[dict[str, Any]], limited: bool) -> Iterator[tuple[str, bool, str]]:
    for row in rows:
        # What is inserted into is listed as read in full.
        if row.get("table") and row["select_type"] != "INSERT" and not str(row["table"]).startswith("<"):
            how = f"{row['select_type']} {row['type']} by {row['key']}, {row['rows']} rows, {row['Extra']}"
            # A row of an index after the other, and no more than are asked for.
            one_by_one = limited and row["type"] == "index" and "filesort" not in str(row["Extra"])
            yield str(row["table"]), row["type"] in ("ALL", "index") and not one_by_one, how


def _postgresql(plan: dict[str, Any], limited: bool = False) -> Iterator[tuple[str, bool, str]]:
    kind = plan["Node Type"]
    # A row of an index after the other, and no more than are asked for.
    limited = kind == "Limit" or (limited and kind == "Index Scan")
    if table := plan.get("Relation Name"):
        bounded = limited or "Index Cond" in plan or kind == "Bitmap Heap Scan" or kind == "ModifyTable"
        how = f"{kind} by {plan.get('Index Name')}, {plan['Plan Rows']} rows, {plan.get('Index Cond')}"
        yield table, not bounded, how
    for below in plan.get("Plans", ()):
        yield from _postgresql(below, limited)
