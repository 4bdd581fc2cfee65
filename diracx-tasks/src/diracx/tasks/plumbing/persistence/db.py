"""The dead-letter queue in SQL: `DIRACX_DB_URL_TASKDB`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from diracx.db.sql.utils import BaseSQLDB
from sqlalchemy import func, insert, select, update

from .letter import DeadLetter
from .schema import DeadLetters, DeadLetterStatus, TaskDBBase


class TaskDB(BaseSQLDB):
    """Dead letters. `async with db:` is one transaction, as in every DiracX database."""

    metadata = TaskDBBase.metadata

    async def insert(self, letter: DeadLetter) -> None:
        """Store a dead letter. Storing the same task again brings its row up to date: safe to repeat."""
        values = {
            "task_name": letter.task_name,
            "reason": letter.reason,
            "detail": letter.detail,
            "message": letter.data,
            "attempts": json.dumps(letter.attempts, default=str),
            "status": DeadLetterStatus.PENDING,
            "buried_at": datetime.now(UTC),
        }
        changed = await self.conn.execute(
            update(DeadLetters).where(DeadLetters.task_id == letter.task_id).values(**values)
        )
        if changed.rowcount == 0:
            await self.conn.execute(insert(DeadLetters).values(task_id=letter.task_id, **values))

    async def search(
        self,
        *,
        task_name: str | None = None,
        reason: str | None = None,
        status: DeadLetterStatus | None = DeadLetterStatus.PENDING,
        limit: int = 100,
        after_id: int = 0,
    ) -> list[dict[str, Any]]:
        """Dead letters, oldest first, one dict for each with the columns' attribute names.

        Args:
            status: None for all.
            after_id: only rows with a greater id, for paging.
        """
        query = (
            select(DeadLetters.__table__).where(DeadLetters.id > after_id).order_by(DeadLetters.id).limit(limit)
        )
        if task_name is not None:
            query = query.where(DeadLetters.task_name == task_name)
        if reason is not None:
            query = query.where(DeadLetters.reason == reason)
        if status is not None:
            query = query.where(DeadLetters.status == status)
        names = {column.name: attribute for attribute, column in DeadLetters.__mapper__.columns.items()}
        rows = (await self.conn.execute(query)).mappings()
        return [
            {names[name]: json.loads(value) if name == "Attempts" else value for name, value in row.items()}
            for row in rows
        ]

    async def count(self) -> dict[DeadLetterStatus, int]:
        """Number of dead letters by status."""
        rows = await self.conn.execute(select(DeadLetters.status, func.count()).group_by(DeadLetters.status))
        return dict(rows.tuples().all())
