"""Migrations of the database of dead letters, and of databases in general."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from textwrap import dedent

import pytest
from diracx.tasks.plumbing.persistence import DeadLetter, TaskDB
from diracx.tasks.plumbing.sql.migrations import Migrations
from sqlalchemy import MetaData, text
from sqlalchemy.exc import DBAPIError
from support.schema_promises import KINDS, SchemaPromises, connected, on, rows


class TestTaskSchema(SchemaPromises):
    migrations = TaskDB.migrations

    async def fill(self, url: str) -> None:
        db = TaskDB(url)
        async with db.engine_context(), db:
            for number in range(3):
                dead_letter = DeadLetter(
                    task_id=f"task {number}",
                    task_name="my_tasks:Download",
                    reason="exhausted",
                    detail="🚀",
                    data=bytes(range(256)),
                    attempts=[{"message": "no"}],
                    delivery_id=str(number),
                )
                await db.insert(dead_letter)


@pytest.fixture
def family(tmp_path: Path) -> Migrations:
    """Parents and children: a revision copies the parents' table on SQLite, the next one fails half way."""
    (tmp_path / "r" / "versions").mkdir(parents=True)
    (tmp_path / "r" / "env.py").write_text("from diracx.tasks.plumbing.sql.migrations import run_env\nrun_env()\n")
    revisions = {
        "0001": """
            op.create_table("parents", sa.Column("id", sa.Integer, primary_key=True), sa.Column("old", sa.Integer))
            op.create_table("children", sa.Column("id", sa.Integer, primary_key=True),
                sa.Column("parent", sa.Integer, sa.ForeignKey("parents.id", ondelete="CASCADE")))
            """,
        "0002": """
            with op.batch_alter_table("parents", recreate="auto") as batch:
                batch.alter_column("old", existing_type=sa.Integer, type_=sa.BigInteger)
            """,
        "0003": """
            op.add_column("parents", sa.Column("new", sa.Integer))
            op.execute("INSERT INTO parents (id) SELECT id FROM parents")
            """,
    }
    before = None
    for revision, body in revisions.items():
        (tmp_path / "r" / "versions" / f"v{revision}.py").write_text(
            f'"""Revision {revision}."""\nimport sqlalchemy as sa\nfrom alembic import op\n'
            f"revision = {revision!r}\ndown_revision = {before!r}\n"
            f"def upgrade():\n{dedent(body).replace(chr(10), chr(10) + '    ')}\n"
        )
        before = revision
    return Migrations("Family", MetaData(), tmp_path / "r", "family db")


@pytest.mark.parametrize("kind", KINDS)
async def test_replacing_a_table_by_its_copy_deletes_no_rows_of_other_tables(
    kind: str, family: Migrations, empty_database: Callable[[str], Awaitable[str]]
) -> None:
    url = await empty_database(kind)
    await family.upgrade(url, "0001")
    async with connected(url) as connection:
        await connection.execute(text("INSERT INTO parents VALUES (1, 7)"))
        await connection.execute(text("INSERT INTO children VALUES (1, 1)"))
    await family.upgrade(url, "0002")
    found = await on(url, rows)
    assert (found["parents"], found["children"]) == ([{"id": 1, "old": 7}], [{"id": 1, "parent": 1}])


@pytest.mark.parametrize("kind", KINDS)
async def test_a_revision_that_fails_leaves_the_database_at_the_one_before(
    kind: str, family: Migrations, empty_database: Callable[[str], Awaitable[str]]
) -> None:
    url = await empty_database(kind)
    await family.upgrade(url, "0001")
    async with connected(url) as connection:
        await connection.execute(text("INSERT INTO parents VALUES (1, 7)"))
    with pytest.raises(DBAPIError):
        await family.upgrade(url)
    found = await on(url, rows)
    # Where a change of the schema is part of a transaction, nothing is left of it, nor of what came before it.
    kept = {"id": 1, "old": 7} | ({"new": None} if kind == "mariadb" else {})
    assert found["parents"] == [kept]
    assert found["FamilyVersion"] == [{"version_num": "0002" if kind == "mariadb" else "0001"}]
