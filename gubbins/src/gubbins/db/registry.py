"""Statements for DiracX's pilot registry, `PilotAgentsDB`, each for many pilots and a transaction of its own."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from diracx.core.models.pilot import PilotStatus
from diracx.db.sql import PilotAgentsDB
from diracx.db.sql.pilots.schema import JobToPilotMapping, PilotAgents, PilotOutput
from diracx.tasks.plumbing.sql.databases import database_urls, watch_connections
from sqlalchemy import Select, Table, case, delete, insert, select, update

REGISTRY = "PilotAgentsDB"
REGISTRY_VARIABLE = "DIRACX_DB_URL_PILOTAGENTSDB"

_agents, _output, _jobs = (cast(Table, table.__table__) for table in (PilotAgents, PilotOutput, JobToPilotMapping))
_NOT_ENDED = (PilotStatus.SUBMITTED, PilotStatus.WAITING, PilotStatus.RUNNING, PilotStatus.UNKNOWN)


class Entry(NamedTuple):
    """An entry of the registry."""

    registry_id: int
    stamp: str
    status: str
    vo: str
    ce_name: str


_ENTRY = tuple(_agents.c[name] for name in ("PilotID", "PilotStamp", "Status", "VO", "DestinationSite"))


@contextlib.asynccontextmanager
async def open_registry() -> AsyncIterator[PilotAgentsDB | None]:
    """Open the registry configured in the environment, without connecting; None: none is configured.

    Raises:
        TaskConfigError: the variable is no URL of a database.
    """
    if (url := database_urls(REGISTRY).get(REGISTRY)) is None:
        yield None
        return
    registry = cast(PilotAgentsDB, PilotAgentsDB.available_implementations(REGISTRY)[0](url))
    async with registry.engine_context():
        watch_connections(registry.engine)
        yield registry


# Not `async with registry`: that logs a traceback when the server is away.


async def find_entries(
    registry: PilotAgentsDB, ids: Collection[int], references: Collection[str], stamps: Collection[str]
) -> dict[str, list[Entry]]:
    """Find entries by stamp, lowest id first.

    The registry has no index of stamps: entries are found by their id or reference.
    """
    entries: set[Entry] = set()
    async with registry.engine.begin() as connection:
        for names, column in ((ids, _agents.c.PilotID), (references, _agents.c.PilotJobReference)):
            statement = select(*_ENTRY).where(column.in_(names), _agents.c.PilotStamp.in_(stamps))
            entries.update(Entry(*row) for row in await connection.execute(statement))
    found: dict[str, list[Entry]] = defaultdict(list)
    for entry in sorted(entries):
        found[entry.stamp].append(entry)
    return found


async def list_open(
    registry: PilotAgentsDB, ce_names: Collection[str], vo: str | None, *, after: int, limit: int
) -> list[Entry]:
    """List entries of active pilots at these compute elements (of one VO, or all), with ids above `after`."""
    statement = (
        select(*_ENTRY)
        .where(_agents.c.Status.in_(_NOT_ENDED), _agents.c.DestinationSite.in_(ce_names))
        .where(_agents.c.PilotID > after)
        .order_by(_agents.c.PilotID)
        .limit(limit)
    )
    if vo is not None:
        statement = statement.where(_agents.c["VO"] == vo)
    async with registry.engine.begin() as connection:
        return [Entry(*row) for row in await connection.execute(statement)]


async def insert_entries(registry: PilotAgentsDB, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert entries, given as {column: value}."""
    async with registry.engine.begin() as connection:
        await connection.execute(insert(_agents), rows)


async def delete_entries(registry: PilotAgentsDB, ids: Collection[int]) -> None:
    """Delete duplicate entries."""
    async with registry.engine.begin() as connection:
        await connection.execute(delete(_agents).where(_agents.c.PilotID.in_(ids)))


async def update_entries(
    registry: PilotAgentsDB, ids: Collection[int], values: Mapping[str, Mapping[str, Any]], **for_all: Any
) -> None:
    """Update entries by one statement.

    Args:
        ids: ids of the entries. An id with another stamp, as in a recreated registry, is skipped.
        values: {stamp: {column: value}}, with the same columns for each.
        for_all: {column: value}.
    """
    stamp = _agents.c.PilotStamp
    own = {
        name: case({each: row[name] for each, row in values.items()}, value=stamp, else_=_agents.c[name])
        for name in next(iter(values.values()))
    }
    where = (_agents.c.PilotID.in_(ids), stamp.in_(values))
    async with registry.engine.begin() as connection:
        await connection.execute(update(_agents).where(*where).values(**own, **for_all))


async def jobs_of(registry: PilotAgentsDB, registry_id: int, stamp: str, *, limit: int) -> list[int]:
    """Read the ids of the jobs that ran on a pilot, newest first."""
    statement = (
        select(_jobs.c.JobID)
        .join(_agents, _agents.c.PilotID == _jobs.c.PilotID)
        .where(_jobs.c.PilotID == registry_id, _agents.c.PilotStamp == stamp)
        .order_by(_jobs.c.JobID.desc())
        .limit(limit)
    )
    return await _scalars(registry, statement)


async def stamps_of(registry: PilotAgentsDB, job_id: int, *, limit: int) -> list[str]:
    """Read the stamps of the pilots on which a job ran."""
    statement = (
        select(_agents.c.PilotStamp)
        .join(_jobs, _agents.c.PilotID == _jobs.c.PilotID)
        .where(_jobs.c.JobID == job_id)
        .limit(limit)
    )
    return await _scalars(registry, statement)


async def _scalars(registry: PilotAgentsDB, statement: Select[Any]) -> list[Any]:
    async with registry.engine.begin() as connection:
        return list((await connection.execute(statement)).scalars())


async def write_outputs(registry: PilotAgentsDB, outputs: Iterable[tuple[int | None, str, str]]) -> None:
    """Write or replace outputs, given as (id, stdout, stderr)."""
    rows = [{"PilotID": id, "StdOutput": stdout, "StdError": stderr} for id, stdout, stderr in outputs]
    async with registry.engine.begin() as connection:
        await connection.execute(delete(_output).where(_output.c.PilotID.in_([row["PilotID"] for row in rows])))
        await connection.execute(insert(_output), rows)
