"""Dead letters of any task and error are stored and read unchanged in every database."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from diracx.tasks.plumbing.persistence import DeadLetter, TaskDB
from diracx.tasks.plumbing.sql.types import AnyLongText, AnyName, AnyText, sanitize, truncate
from sqlalchemy import Enum, String, Text
from support.hostile_text import NAMES, TEXTS


@pytest.fixture
async def task_db(any_database: str) -> AsyncIterator[TaskDB]:
    database = TaskDB(any_database)
    async with database.engine_context():
        await database.migrations.create(database.engine)
        yield database


def dead_letter(name: str, text: str) -> DeadLetter:
    attempt = {"type": text, "message": text, "traceback": text}
    return DeadLetter(
        task_id=name, task_name=f"test:{name}", reason="exhausted", detail=text, data=b"\0\xff", attempts=[attempt]
    )


def test_every_text_column_takes_any_text() -> None:
    columns = [column for table in TaskDB.metadata.tables.values() for column in table.columns]
    texts = [column.type for column in columns if isinstance(column.type, String | Text)]
    assert [kind for kind in texts if not isinstance(kind, Enum | AnyName | AnyText | AnyLongText)] == []


async def test_details_and_attempts_are_read_as_they_were_stored(task_db: TaskDB) -> None:
    for number, text in enumerate(TEXTS):
        await task_db.insert(dead_letter(f"task {number}", text))
        found = await task_db.find(f"task {number}")
        assert found is not None
        assert (found["detail"], found["message"]) == (sanitize(text), b"\0\xff")
        assert {sanitize(value) for value in found["attempts"][0].values()} == {sanitize(text)}


async def test_task_ids_names_and_deliveries_stay_apart(task_db: TaskDB) -> None:
    for name in NAMES:
        await task_db.insert(dead_letter(name, "first"))
    for name in NAMES:
        found = await task_db.find(name)
        assert found is not None
        assert found["task_id"] == truncate(name, 255)
        assert found["history"] == []
        assert [each["id"] for each in await task_db.search(task_name=f"test:{name}")] == [found["id"]]
        assert await task_db.discard([(found["id"], found["delivery_id"])]) == {found["id"]}
    assert sum((await task_db.count()).values()) == len(NAMES)


async def test_the_search_for_a_class_is_case_sensitive(task_db: TaskDB) -> None:
    for name in ("Download", "download", "down_oad"):
        await task_db.insert(dead_letter(name, ""))
        assert [each["task_id"] for each in await task_db.search(task_name=name)] == [name]
