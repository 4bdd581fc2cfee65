"""The dead-letter queue in SQL: `DIRACX_DB_URL_TASKDB`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict

from sqlalchemy import JSON, ColumnElement, Select, and_, cast, func, insert, or_, select, update

from ..sql.clock import DatabaseClock
from ..sql.migrations import Migrations
from ..sql.session import Database, transaction
from ..sql.types import sanitize, truncate
from ..task_names import resolve_task_name
from .dead_letter import OPEN, DeadLetter, DeadLetterStatus
from .schema import LONGEST_NAME, DeadLetters, TaskDBBase
from .text import attempts_as_text, history_as_text

#: Earlier failures of a task that are kept in its history.
_FAILURES_KEPT = 20
_LONGEST_DETAIL = 10_000
_AS_JSON = ("attempts", "history")
#: Columns that lists do not read: they may have megabytes.
_BODIES = ("message", *_AS_JSON)
_ATTRIBUTES = {column.name: attribute for attribute, column in DeadLetters.__mapper__.columns.items()}


class DeadLetterFilter(TypedDict, total=False):
    """Filter of dead letters; each key narrows it down."""

    task_name: str | None
    """`category:ClassName`, or the class name alone."""
    reason: str | None
    status: DeadLetterStatus | Collection[DeadLetterStatus] | None
    """None for all."""
    since: datetime | None
    """Stored then or later."""
    before: datetime | None
    """Stored earlier."""
    vo: str | None
    """Only those of this VO; None: of all VOs, and of none."""


class TaskDB(Database):
    """Dead letters. `async with db:` is one transaction, as in every DiracX database.

    Each method joins the transaction of its caller, or is one of its own that is repeated after a deadlock.
    SQLite, MySQL or MariaDB, and PostgreSQL (`postgresql+asyncpg://`).
    """

    metadata = TaskDBBase.metadata
    init_command = "diracx-task-run dlq init"
    migrations = Migrations("TaskDB", metadata, Path(__file__).parent / "migrations", "diracx-task-run db")

    def __init__(self, db_url: str) -> None:
        super().__init__(db_url)
        self.clock = DatabaseClock()

    @contextlib.asynccontextmanager
    async def engine_context(self) -> AsyncIterator[None]:
        """Open the engine while the context lasts."""
        async with super().engine_context():
            self.clock.follow(self.engine)
            yield

    # --- storing ----------------------------------------------------------------------------------------

    @transaction
    async def insert_all(self, dead_letters: Sequence[DeadLetter]) -> None:
        """Store dead letters: all of them or, on any error, none. Each as by `insert`."""
        ids = {each.task_id for each in dead_letters}
        if await self._lock(DeadLetters.task_id.in_(ids)) == 0 and len(ids) == len(dead_letters):
            rows = [{"task_id": each.task_id, "history": "[]", **self._values(each)} for each in dead_letters]
            # With several rows, SQLAlchemy knows columns by their own names only.
            named = [{column: row[name] for column, name in _ATTRIBUTES.items() if name in row} for row in rows]
            await self.conn.execute(insert(DeadLetters), named)
            return
        for each in dead_letters:
            await self.insert(each)

    @transaction
    async def insert(self, dead_letter: DeadLetter) -> None:
        """Store a dead letter. Storing the same delivery again changes nothing: safe to repeat.

        A task that failed before and has run since keeps its row: the earlier failure moves to its history, and
        the dead letter is pending again.
        """
        values = self._values(dead_letter)
        mine = DeadLetters.task_id == dead_letter.task_id
        if await self._lock(mine) == 0:
            new = insert(DeadLetters).values(task_id=dead_letter.task_id, history="[]", **values)
            await self.conn.execute(new)
            return
        [row] = await self._rows(select(DeadLetters.__table__).where(mine))
        if values["delivery_id"] not in (row["delivery_id"], *(failure["burial"] for failure in row["history"])):
            history = history_as_text([*row["history"], _failure_record(row)][-_FAILURES_KEPT:])
            await self.conn.execute(update(DeadLetters).where(mine).values(history=history, **values))

    async def _lock(self, rows: ColumnElement[bool]) -> int:
        """Lock rows (on SQLite the database), so that what is read is not stale. Returns their number."""
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
        self,
        *,
        task_name: str | None = None,
        reason: str | None = None,
        status: DeadLetterStatus | Collection[DeadLetterStatus] | None = DeadLetterStatus.PENDING,
        since: datetime | None = None,
        before: datetime | None = None,
        vo: str | None = None,
        limit: int = 100,
        after_id: int = 0,
    ) -> list[dict[str, Any]]:
        """Find dead letters, oldest row first, one dict for each with the columns' attribute names, in full.

        Args:
            task_name: `category:ClassName`, or the class name alone.
            status: one or several; None for all.
            since: stored then or later.
            before: stored earlier.
            vo: only of this VO.
            after_id: only rows with a greater id, for paging.

        Raises:
            AmbiguousTaskNameError: when dead letters of several tasks have that class name.
        """
        conditions = _conditions(await self._full_name(task_name), reason, status, since, before, vo)
        query = select(DeadLetters.__table__).where(DeadLetters.id > after_id, *conditions)
        return await self._rows(query.order_by(DeadLetters.id).limit(limit))

    @transaction
    async def summaries(
        self,
        *,
        task_name: str | None = None,
        reason: str | None = None,
        status: DeadLetterStatus | Collection[DeadLetterStatus] | None = None,
        since: datetime | None = None,
        before: datetime | None = None,
        vo: str | None = None,
        limit: int = 100,
        after_id: int = 0,
    ) -> list[dict[str, Any]]:
        """As `search`, for lists: the message, the attempts and the history stay in the database.

        In their place are `message_bytes`, `failed_attempts` and `earlier_burials`. Arguments and errors as in
        `search`.
        """
        conditions = _conditions(await self._full_name(task_name), reason, status, since, before, vo)
        query = self._summary_query().where(DeadLetters.id > after_id, *conditions)
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
        """Read messages by id and delivery id; those of dead letters that changed since are left out."""
        if not chosen:
            return {}
        rows = await self.conn.execute(select(DeadLetters.id, DeadLetters.message).where(_these(chosen)))
        return {number: bytes(message) for number, message in rows}

    @transaction
    async def find(self, key: str) -> dict[str, Any] | None:
        """Find the dead letter of this task id, else of this number; None when there is none."""
        found = await self._rows(select(DeadLetters.__table__).where(DeadLetters.task_id == key))
        if not found and (number := _number(key)) is not None:
            found = await self._rows(select(DeadLetters.__table__).where(DeadLetters.id == number))
        return found[0] if found else None

    @transaction
    async def find_summary(self, key: str) -> dict[str, Any] | None:
        """As `find`, with the columns of `summaries`."""
        query = self._summary_query()
        found = (await self.conn.execute(query.where(DeadLetters.task_id == key))).mappings().first()
        if found is None and (number := _number(key)) is not None:
            found = (await self.conn.execute(query.where(DeadLetters.id == number))).mappings().first()
        return None if found is None else dict(found)

    @transaction
    async def count(
        self,
        *,
        task_name: str | None = None,
        reason: str | None = None,
        status: DeadLetterStatus | Collection[DeadLetterStatus] | None = None,
        since: datetime | None = None,
        before: datetime | None = None,
        vo: str | None = None,
    ) -> dict[DeadLetterStatus, int]:
        """Count dead letters by status. Arguments and errors as in `search`."""
        conditions = _conditions(await self._full_name(task_name), reason, status, since, before, vo)
        query = select(DeadLetters.status, func.count()).where(*conditions).group_by(DeadLetters.status)
        return dict((await self.conn.execute(query)).all())

    @transaction
    async def count_open(self) -> tuple[int, datetime | None]:
        """Count dead letters to be decided about, and return when the first was stored."""
        query = select(func.count(), func.min(DeadLetters.buried_at)).where(DeadLetters.status.in_(OPEN))
        number, first = (await self.conn.execute(query)).one()
        return number, first

    @transaction
    async def count_by_task(self) -> dict[tuple[str, DeadLetterStatus], int]:
        """Count dead letters by task name and status."""
        which = DeadLetters.task_name, DeadLetters.status
        rows = await self.conn.execute(select(*which, func.count()).group_by(*which))
        return {(name, status): number for name, status, number in rows}

    # --- deciding ---------------------------------------------------------------------------------------

    @transaction
    async def begin_resubmission(self, chosen: Sequence[tuple[int, str]]) -> dict[int, datetime]:
        """Mark pending dead letters as being re-submitted: the first of three steps.

        Args:
            chosen: id and delivery id of each.

        Returns:
            id -> since when, of those that may be submitted now, those that another process has begun included.
        """
        if not chosen:
            return {}
        these = _these(chosen)
        await self._decide(these, DeadLetterStatus.PENDING, DeadLetterStatus.RESUBMITTING)
        query = select(DeadLetters.id, DeadLetters.changed_at)
        begun = query.where(these, DeadLetters.status == DeadLetterStatus.RESUBMITTING)
        return dict((await self.conn.execute(begun)).all())

    @transaction
    async def end_resubmission(self, chosen: Sequence[tuple[int, str]]) -> None:
        """Mark dead letters as re-submitted: the last step. Those that failed again meanwhile stay pending."""
        if chosen:
            await self._decide(_these(chosen), DeadLetterStatus.RESUBMITTING, DeadLetterStatus.RESUBMITTED)

    @transaction
    async def discard(self, chosen: Sequence[tuple[int, str]]) -> set[int]:
        """Mark pending dead letters as discarded. Returns the ids of all that are discarded now.

        Args:
            chosen: id and delivery id of each.
        """
        if not chosen:
            return set()
        these = _these(chosen)
        await self._decide(these, DeadLetterStatus.PENDING, DeadLetterStatus.DISCARDED)
        query = select(DeadLetters.id).where(these, DeadLetters.status == DeadLetterStatus.DISCARDED)
        return set((await self.conn.execute(query)).scalars())

    async def _decide(self, these: ColumnElement[bool], was: DeadLetterStatus, now: DeadLetterStatus) -> None:
        change = update(DeadLetters).where(these, DeadLetters.status == was)
        await self.conn.execute(change.values(status=now, changed_at=self.clock.now()))

    async def _full_name(self, task_name: str | None) -> str | None:
        """Return the registry name, from that or from the name of the class alone."""
        if task_name is None or ":" in task_name:
            return task_name
        of_class = DeadLetters.task_name.endswith(f":{task_name}", autoescape=True)
        names = await self.conn.execute(select(DeadLetters.task_name).where(of_class).distinct())
        return resolve_task_name(task_name, names.scalars()) or task_name

    async def _rows(self, query: Select[Any]) -> list[dict[str, Any]]:
        rows = (await self.conn.execute(query)).mappings()
        named = [{_ATTRIBUTES[name]: value for name, value in row.items()} for row in rows]
        return [
            row | {name: json.loads(row[name]) for name in _AS_JSON} | {"message_bytes": len(row["message"])}
            for row in named
        ]


def _number(key: str) -> int | None:
    return int(key) if key.isdecimal() and len(key) < 11 and int(key) < 2**31 else None


def _these(chosen: Iterable[tuple[int, str]]) -> ColumnElement[bool]:
    """Select exactly these dead letters as they were read: not those that failed again since."""
    return or_(*(and_(DeadLetters.id == number, DeadLetters.delivery_id == name) for number, name in chosen))


def _conditions(
    task_name: str | None,
    reason: str | None,
    status: DeadLetterStatus | Collection[DeadLetterStatus] | None,
    since: datetime | None,
    before: datetime | None,
    vo: str | None,
) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if task_name is not None:
        conditions.append(DeadLetters.task_name == task_name)
    if reason is not None:
        conditions.append(DeadLetters.reason == reason)
    if isinstance(status, DeadLetterStatus):
        conditions.append(DeadLetters.status == status)
    elif status is not None:
        conditions.append(DeadLetters.status.in_(status))
    if since is not None:
        conditions.append(DeadLetters.buried_at >= since)
    if before is not None:
        conditions.append(DeadLetters.buried_at < before)
    if vo is not None:
        conditions.append(DeadLetters.vo == vo)
    return conditions


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
