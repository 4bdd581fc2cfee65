"""Database of dead letters, `DIRACX_DB_URL_TASKDB`."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict, Unpack

from sqlalchemy import JSON, ColumnElement, RowMapping, Select, cast, false, func, insert, or_, select, update

from ..sql.migrations import Migrations
from ..sql.session import Database, transaction
from ..sql.types import sanitize, truncate
from ..task_names import resolve_task_name
from .dead_letter import FORGOTTEN_AFTER, OPEN, DeadLetter, DeadLetterStatus
from .schema import LONGEST_NAME, DeadLetters, TaskDBBase
from .text import attempts_as_text, history_as_text

#: Maximum number of earlier failures in the history of a dead letter.
_FAILURES_KEPT = 20
_LONGEST_DETAIL = 10_000
_AS_JSON = ("attempts", "history")
#: Columns that lists do not read, as they may have megabytes.
_BODIES = ("message", *_AS_JSON)
_ATTRIBUTES = {column.name: attribute for attribute, column in DeadLetters.__mapper__.columns.items()}


class DeadLetterFilter(TypedDict, total=False):
    """Filter of dead letters; all given conditions must match."""

    task_name: str | None
    """`category:ClassName`, or the class name alone."""
    reason: str | None
    status: DeadLetterStatus | Collection[DeadLetterStatus] | None
    """None for all."""
    since: datetime | None
    """Stored at this time or later."""
    before: datetime | None
    """Stored before this time."""
    vo: str | None
    """Only those of this VO; None: of all VOs, and of none."""


class TaskDB(Database):
    """Database of dead letters. `async with db:` is one transaction, as in every DiracX database.

    Each method joins the transaction of its caller, or runs in its own one, which is repeated after a deadlock.
    Supports SQLite, MySQL or MariaDB, and PostgreSQL (`postgresql+asyncpg://`).
    """

    metadata = TaskDBBase.metadata
    init_command = "diracx-task-run dlq init"
    migrations = Migrations("TaskDB", metadata, Path(__file__).parent / "migrations", "diracx-task-run db")

    # --- storing ----------------------------------------------------------------------------------------

    @transaction
    async def insert_all(self, dead_letters: Sequence[DeadLetter]) -> None:
        """Store dead letters as `insert` does: all of them or, after any error, none."""
        ids = {each.task_id for each in dead_letters}
        if await self._lock(DeadLetters.task_id.in_(ids)) == 0 and len(ids) == len(dead_letters):
            rows = [{"task_id": each.task_id, "history": "[]", **self._values(each)} for each in dead_letters]
            # For several rows, SQLAlchemy needs names of columns, not of attributes.
            named = [{column: row[name] for column, name in _ATTRIBUTES.items() if name in row} for row in rows]
            await self.conn.execute(insert(DeadLetters), named)
            return
        for each in dead_letters:
            await self.insert(each)

    @transaction
    async def insert(self, dead_letter: DeadLetter) -> None:
        """Store a dead letter. Idempotent for the same delivery.

        If another delivery of the task failed before, its failure moves to the history of the row, whose status
        becomes pending again.
        """
        values = self._values(dead_letter)
        of_task = DeadLetters.task_id == dead_letter.task_id
        if await self._lock(of_task) == 0:
            new = insert(DeadLetters).values(task_id=dead_letter.task_id, history="[]", **values)
            await self.conn.execute(new)
            return
        [row] = await self._rows(select(DeadLetters.__table__).where(of_task))
        if values["delivery_id"] not in (row["delivery_id"], *(failure["burial"] for failure in row["history"])):
            history = history_as_text([*row["history"], _failure_record(row)][-_FAILURES_KEPT:])
            await self.conn.execute(update(DeadLetters).where(of_task).values(history=history, **values))

    async def _lock(self, rows: ColumnElement[bool]) -> int:
        """Lock rows (on SQLite the database) before they are read. Returns their number."""
        locked = await self.conn.execute(update(DeadLetters).where(rows).values(task_id=DeadLetters.task_id))
        return locked.rowcount

    def _values(self, dead_letter: DeadLetter) -> dict[str, Any]:
        now = self.clock.now()
        return {
            "task_name": dead_letter.task_name,
            "vo": dead_letter.vo,
            "reason": dead_letter.reason,
            "detail": sanitize(dead_letter.detail, _LONGEST_DETAIL),
            "message": dead_letter.data,
            "attempts": attempts_as_text(dead_letter.attempts),
            "delivery_id": truncate(dead_letter.delivery_id, LONGEST_NAME),
            "status": DeadLetterStatus.PENDING,
            "buried_at": now,
            "changed_at": now,
        }

    # --- reading ----------------------------------------------------------------------------------------

    @transaction
    async def search(
        self, *, limit: int = 100, after_id: int = 0, **where: Unpack[DeadLetterFilter]
    ) -> list[dict[str, Any]]:
        """Return dead letters by id, as dicts with all attributes.

        Args:
            after_id: only rows with a greater id, for pagination.
            where: by default pending ones.

        Raises:
            AmbiguousTaskNameError: dead letters of several tasks have the class name.
        """
        conditions = await self._conditions({"status": DeadLetterStatus.PENDING, **where})
        query = select(DeadLetters.__table__).where(DeadLetters.id > after_id, *conditions)
        return await self._rows(query.order_by(DeadLetters.id).limit(limit))

    @transaction
    async def summaries(
        self, *, limit: int = 100, after_id: int = 0, **where: Unpack[DeadLetterFilter]
    ) -> list[dict[str, Any]]:
        """Return dead letters as `search`, of any status by default, for lists.

        `message_bytes`, `failed_attempts` and `earlier_burials` are in place of message, attempts and history.
        """
        query = self._summary_query().where(DeadLetters.id > after_id, *await self._conditions(where))
        rows = await self.conn.execute(query.order_by(DeadLetters.id).limit(limit))
        return [dict(row) for row in rows.mappings()]

    def _summary_query(self) -> Select[Any]:
        columns = [
            column.label(name) for name, column in DeadLetters.__mapper__.columns.items() if name not in _BODIES
        ]
        return select(
            *columns,
            func.length(DeadLetters.message).label("message_bytes"),
            self._array_length(DeadLetters.attempts).label("failed_attempts"),
            self._array_length(DeadLetters.history).label("earlier_burials"),
        )

    def _array_length(self, text: Any) -> ColumnElement[int]:
        match self.engine.dialect.name:
            case "postgresql":
                return func.json_array_length(cast(text, JSON))
            case "sqlite":
                return func.json_array_length(text)
            case _:
                return func.json_length(text)

    @transaction
    async def messages(self, chosen: Sequence[tuple[int, str]]) -> dict[int, bytes]:
        """Return messages by id, for pairs of id and delivery id; dead letters that have changed are omitted."""
        rows = await self.conn.execute(select(DeadLetters.id, DeadLetters.message).where(_these(chosen)))
        return {number: bytes(message) for number, message in rows}

    @transaction
    async def find(self, key: str) -> dict[str, Any] | None:
        """Find a dead letter by task id, else by number; None if there is none."""
        row = await self._first(select(DeadLetters.__table__), key)
        return None if row is None else _in_full(row)

    @transaction
    async def find_summary(self, key: str) -> dict[str, Any] | None:
        """Find a dead letter as `find`, with the columns of `summaries`."""
        row = await self._first(self._summary_query(), key)
        return None if row is None else dict(row)

    async def _first(self, query: Select[Any], key: str) -> RowMapping | None:
        found = await self.conn.execute(query.where(DeadLetters.task_id == key))
        row: RowMapping | None = found.mappings().first()
        if row is None and key.isdecimal() and len(key) < 11 and int(key) < 2**31:
            row = (await self.conn.execute(query.where(DeadLetters.id == int(key)))).mappings().first()
        return row

    @transaction
    async def count(self, **where: Unpack[DeadLetterFilter]) -> dict[DeadLetterStatus, int]:
        """Count dead letters by status. Errors as in `search`."""
        counted = select(DeadLetters.status, func.count()).group_by(DeadLetters.status)
        return dict((await self.conn.execute(counted.where(*await self._conditions(where)))).all())

    @transaction
    async def count_open(self) -> tuple[int, datetime | None]:
        """Return the number of open dead letters, and the time at which the first was stored."""
        query = select(func.count(), func.min(DeadLetters.buried_at)).where(DeadLetters.status.in_(OPEN))
        number, first = (await self.conn.execute(query)).one()
        return number, first

    @transaction
    async def count_by_task(self) -> dict[tuple[str, DeadLetterStatus], int]:
        """Count dead letters by task name and status."""
        which = DeadLetters.task_name, DeadLetters.status
        rows = await self.conn.execute(select(*which, func.count()).group_by(*which))
        return {(name, status): number for name, status, number in rows}

    # --- status changes ---------------------------------------------------------------------------------

    @transaction
    async def begin_resubmission(self, chosen: Sequence[tuple[int, str]]) -> dict[int, datetime]:
        """Mark pending dead letters (id, delivery id) as being re-submitted: the first of three steps.

        Returns id -> time of this step, for those that may be submitted, also if another process began it.
        """
        these = _these(chosen)
        await self._decide(these, DeadLetterStatus.PENDING, DeadLetterStatus.RESUBMITTING)
        query = select(DeadLetters.id, DeadLetters.changed_at)
        begun = query.where(these, DeadLetters.status == DeadLetterStatus.RESUBMITTING)
        return dict((await self.conn.execute(begun)).all())

    @transaction
    async def end_resubmission(self, chosen: Sequence[tuple[int, str]]) -> None:
        """Mark dead letters as re-submitted: the last step. Dead letters that failed again stay pending."""
        await self._decide(_these(chosen), DeadLetterStatus.RESUBMITTING, DeadLetterStatus.RESUBMITTED)

    @transaction
    async def discard(self, chosen: Sequence[tuple[int, str]]) -> set[int]:
        """Mark dead letters (id, delivery id) as discarded: pending ones, and those resubmitting for too long.

        Returns the ids of discarded ones.
        """
        these = _these(chosen)
        await self._decide(these, DeadLetterStatus.PENDING, DeadLetterStatus.DISCARDED)
        forgotten = these & (DeadLetters.changed_at < self.clock.now() - FORGOTTEN_AFTER)
        await self._decide(forgotten, DeadLetterStatus.RESUBMITTING, DeadLetterStatus.DISCARDED)
        query = select(DeadLetters.id).where(these, DeadLetters.status == DeadLetterStatus.DISCARDED)
        return set((await self.conn.execute(query)).scalars())

    async def _decide(self, these: ColumnElement[bool], was: DeadLetterStatus, now: DeadLetterStatus) -> None:
        change = update(DeadLetters).where(these, DeadLetters.status == was)
        await self.conn.execute(change.values(status=now, changed_at=self.clock.now()))

    async def _conditions(self, where: DeadLetterFilter) -> list[ColumnElement[bool]]:
        task_name, status = where.get("task_name"), where.get("status")
        if task_name is not None and ":" not in task_name:  # the name of the class alone
            of_class = DeadLetters.task_name.endswith(f":{task_name}", autoescape=True)
            names = await self.conn.execute(select(DeadLetters.task_name).where(of_class).distinct())
            task_name = resolve_task_name(task_name, names.scalars().all()) or task_name
        equal = [
            (DeadLetters.task_name, task_name),
            (DeadLetters.reason, where.get("reason")),
            (DeadLetters.vo, where.get("vo")),
        ]
        conditions: list[ColumnElement[bool]] = [column == value for column, value in equal if value is not None]
        if status is not None:
            statuses = (status,) if isinstance(status, DeadLetterStatus) else status
            conditions.append(DeadLetters.status.in_(statuses))
        if (since := where.get("since")) is not None:
            conditions.append(DeadLetters.buried_at >= since)
        if (before := where.get("before")) is not None:
            conditions.append(DeadLetters.buried_at < before)
        return conditions

    async def _rows(self, query: Select[Any]) -> list[dict[str, Any]]:
        return [_in_full(row) for row in (await self.conn.execute(query)).mappings()]


def _in_full(row: RowMapping) -> dict[str, Any]:
    named = {_ATTRIBUTES[name]: value for name, value in row.items()}
    decoded = {name: json.loads(named[name]) for name in _AS_JSON}
    return named | decoded | {"message_bytes": len(named["message"])}


def _these(chosen: Iterable[tuple[int, str]]) -> ColumnElement[bool]:
    """Make the condition for these dead letters, unless they failed again since they were read."""
    each = ((DeadLetters.id == number) & (DeadLetters.delivery_id == name) for number, name in chosen)
    return or_(false(), *each)


def _failure_record(row: dict[str, Any]) -> dict[str, Any]:
    """Make the history entry of a failure from its row."""
    return {
        "burial": row["delivery_id"],
        "reason": row["reason"],
        "detail": row["detail"],
        "attempts": row["attempts"],
        "status": str(row["status"]),
        "buried_at": row["buried_at"].isoformat(),
        "changed_at": row["changed_at"].isoformat(),
    }
