"""Tests of the tutorial, with a real server and worker."""

from accounts import Settle
from diracx.tasks.testing import TaskSystem
from downloads import Download
from my_tasks import Hello


async def test_hello_greets() -> None:
    async with TaskSystem([Hello]) as system:
        task_id = await Hello("world").schedule()
        result = await system.result(task_id, timeout=5)
        assert result.return_value == "Hello, world!"


async def test_a_bad_address_is_not_tried_again() -> None:
    async with TaskSystem([Download]) as system:
        result = await system.result(await Download("ftp://example.org").schedule())
        assert result.error is not None
        assert result.error["type"] == "UnretryableError"
        async with system.task_db as db:
            [dead_letter] = await db.search(task_name="test:Download")
        assert len(dead_letter["attempts"]) == 1


async def test_one_account_is_settled_by_one_task_at_a_time() -> None:
    async with TaskSystem([Settle], workers=2) as system:
        for _ in range(3):
            await Settle("lhcb").schedule()
        await system.drain(timeout=10)
