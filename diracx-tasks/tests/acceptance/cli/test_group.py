"""The command `group`: callback groups."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from diracx.tasks.plumbing import BaseTask, fire_callback, spawn_with_callback
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis


@dataclass
class Child(BaseTask):
    number: int

    async def execute(self) -> None:
        if self.number < 0:
            raise ValueError("broken by redis://u:sesame@host/1\nand more")


class Callback(BaseTask):
    async def execute(self) -> None: ...


async def test_group_show_and_list_print_the_state_of_groups(
    served, redis_url: str, redis: Redis, one_line
) -> None:
    async with TaskSystem([Child, Callback], redis_url=redis_url) as system:
        failed = await spawn_with_callback([Child(1), Child(-1), Child(2)], Callback(), ttl_seconds=60)
        await system.drain()
    async with TaskSystem([Child, Callback], redis_url=redis_url, workers=0) as system:
        pending = await spawn_with_callback([Child(n) for n in range(12)], Callback(), on_failure=Child(1))

        shown = json.loads(served("group", "show", failed, "--json").stdout)
        [(child, error)] = shown["failed_children"].items()
        assert len(child) == 32
        assert error.startswith("ValueError: broken by redis://u:***@host/1")
        expected = {"state": "failed", "total": 3, "succeeded": 2, "failed": 1, "pending": 0}
        assert expected.items() <= shown.items()
        assert (shown["callback"], shown["on_failure"]) == ("test:Callback", None)

        text = served("group", "show", failed).stdout
        assert "3: 2 succeeded, 1 failed, 0 pending" in text
        assert "ValueError: broken by redis://u:***@host/1 and more" in text
        assert "sesame" not in text
        text = served("group", "show", pending).stdout
        assert "pending     and 2 more" in text
        assert "test:Child" in text

        listed = json.loads(served("group", "list", "--json").stdout)
        assert [(group["group_id"], group["state"]) for group in listed] == [
            (failed, "failed"),
            (pending, "pending"),
        ]
        table = served("group", "list").stdout
        assert failed in table
        assert pending in table

        assert await fire_callback(redis, pending)
        one_line(served("group", "show", pending), 1, pending, "its callback was submitted", "group list")
        await redis.flushall()
    result = served("group", "list")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "no callback groups\n")


def test_group_without_a_command_prints_its_help(cli) -> None:
    result = cli("group")
    assert (result.returncode, result.stderr) == (2, "")
    assert "show" in result.stdout


@pytest.mark.parametrize("command", [("group", "show"), ("group", "shwo")])
def test_group_refuses_wrong_usage_in_one_line(served, one_line, command: tuple[str, ...]) -> None:
    one_line(served(*command), 2)
