"""Compatibility with processes of the published package 0.7.0 on one server; `make compat` runs all scenarios."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from support.published_package import CREATE
from support.warm_commands import WarmCommands

from benchmarks.compat.scenarios import MODULE, SCENARIOS, Tally, World, world

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def new(tmp_path: Path, warm_commands: WarmCommands, published_commands: WarmCommands) -> Iterator[World]:
    """A server for processes of both versions."""
    with world(tmp_path / "world") as made:
        made.popen, made.published_popen = warm_commands.popen, published_commands.popen
        yield made


@pytest.mark.parametrize("scenario", ["upgrade, killed", "rollback, killed"])
def test_nothing_is_lost_doubled_or_stuck(scenario: str, new: World) -> None:
    SCENARIOS[scenario](new)
    assert new.judge() == Tally()


@pytest.mark.parametrize("kind", ["sqlite", "mariadb"])  # all that 0.7 knows
async def test_dead_letters_of_0_7_are_imported_and_can_be_retried(
    new: World, kind: str, empty_database: Callable[[str], Awaitable[str]], warm_commands: WarmCommands
) -> None:
    new.database = await empty_database(kind)
    await asyncio.to_thread(_import_dead_letters, new, warm_commands)


def _import_dead_letters(new: World, warm_commands: WarmCommands) -> None:
    def ours(*arguments: str) -> str:
        done = warm_commands.run(["diracx-task-run", *arguments], env=new.environment(), timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    new.run(CREATE + _SUBMIT)
    worker = new.worker("0.7")
    new.until(lambda: new.log.read_text().count("Tried") == 2, "both have failed", 60)
    new.end([worker], kill=False)

    assert "2 dead letters imported from dlq_tasks" in ours("dlq", "init")
    assert "dlq_tasks" not in ours("dlq", "init"), "once"
    assert "number 7 is doomed" in ours("dlq", "list")
    shown = [ours("dlq", "show", number) for number in ("1", "2")]  # in the order in which they failed
    assert all("numbered:Doomed" in text and "RuntimeError" in text for text in shown)
    assert {number for number in (7, 8) for text in shown if f"[{number}]" in text} == {7, 8}
    assert "2 submitted again" in ours("dlq", "retry", "--all", "--yes", "--module", MODULE)
    new.until_published_is_gone()
    worker = new.worker("ours")
    new.until(lambda: new.log.read_text().count("Tried") == 4, "both were tried again", 60)
    assert new.tally.problems == []
    new.end([worker], kill=False)
    assert "dlq_tasks" not in ours("dlq", "init"), "nor what has failed again"


_SUBMIT = """
import asyncio, os
from benchmarks.compat.numbered import Doomed
from benchmarks.compat.submit import bound
async def submit():
    async with bound(os.environ["DIRACX_TASKS_REDIS_URL"]):
        for number in (7, 8):
            await Doomed(number).schedule()
asyncio.run(submit())
"""
