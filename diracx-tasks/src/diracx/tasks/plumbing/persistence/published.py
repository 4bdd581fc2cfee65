"""Imports the dead letters of the published package 0.7 from its table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import String, cast, column, inspect, select, table

from ..broker.labels import LABEL_VO
from ..broker.models import TaskMessage
from ..messages.codec import loads
from ..sql.migrations import exclusive
from .dead_letter import DeadLetter, DeadLetterReason
from .schema import DeadLetters

if TYPE_CHECKING:
    from .db import TaskDB

_NAME = "dlq_tasks"
_ROWS = table(_NAME, *map(column, ("id", "task_class", "task_args", "submitted_at", "status", "last_error")))
_PAGE = 100


async def import_published(db: TaskDB) -> int:
    """Import pending dead letters, and keep their rows. Idempotent. Returns the number of new ones."""
    new = after = 0
    while True:
        async with db, exclusive(db.conn, db.migrations.version_table):
            if not await db.conn.run_sync(lambda connection: inspect(connection).has_table(_NAME)):
                return 0
            pending = (_ROWS.c.id > after, cast(_ROWS.c.status, String) == "PENDING")
            query = select(_ROWS).where(*pending).order_by(_ROWS.c.id).limit(_PAGE)
            dead_letters = [_dead_letter(row) for row in (await db.conn.execute(query)).mappings()]
            if not dead_letters:
                return new
            after = int(dead_letters[-1].delivery_id.rpartition("/")[2])
            known = DeadLetters.task_id.in_([each.task_id for each in dead_letters])
            new += len(dead_letters) - len((await db.conn.execute(select(DeadLetters.task_id).where(known))).all())
            await db.insert_all(dead_letters)


def _dead_letter(row: Any) -> DeadLetter:
    error = row["last_error"] or ""
    last = error.strip().rpartition("\n")[2]
    kind, _, message = last.partition(": ")
    common: dict[str, Any] = {
        "task_id": f"{_NAME}-{row['id']}",  # 0.7 does not store that of the task
        "task_name": row["task_class"],
        "delivery_id": f"{_NAME}/{row['id']}",
        "detail": last or "failed under diracx-tasks 0.7",
    }
    try:
        stored = loads(row["task_args"])
        task = TaskMessage(task_id=common["task_id"], task_name=common["task_name"], **stored)
        vo = task.labels.get(LABEL_VO)
        data = task.dumpb()
    except Exception:  # undecodable: keep the bytes
        return DeadLetter(reason=DeadLetterReason.UNPARSABLE, data=bytes(row["task_args"]), **common)
    attempt = {"type": kind, "message": message, "traceback": error, "ended": str(row["submitted_at"])}
    return DeadLetter(
        reason=DeadLetterReason.EXHAUSTED,
        data=data,
        vo=vo if isinstance(vo, str) else None,
        attempts=[attempt] if error else [],
        **common,
    )
