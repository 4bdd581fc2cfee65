"""`cancel`: take tasks back, wherever they are."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CliError, explained_redis, one_line
from ..options import JsonOption, RedisUrlFileOption, RedisUrlOption, resolve_redis_url
from ..output import echo, echo_json

if TYPE_CHECKING:
    from ...plumbing.broker.cancel import TaskPlace


def cancel(
    task_ids: Annotated[
        list[str], typer.Argument(metavar="ID", help="Task ids, as `submit` and `schedule()` give them.")
    ],
    as_json: JsonOption = False,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """Cancel tasks: queued, delayed, retrying, waiting for a lock, or running.

    Prints where each was found. What has not begun is gone at once; what runs is cancelled by its worker within
    about a second. It is not retried and no dead letter. Exits with 1 when an id is unknown: such a task never
    was, or it has ended.

    Example: diracx-task-run cancel 0f3c6dd2a7b84c0e9a3c5b1d8e7f6a90
    """
    url = resolve_redis_url(redis_url, redis_url_file)
    found = asyncio.run(_cancel(url, list(dict.fromkeys(task_ids))))
    if as_json:
        echo_json([{"task_id": task, "found": str(place)} for task, place in found.items()])
    else:
        for task, place in found.items():
            echo(f"{one_line(task)}  {place}")
    unknown = [task for task, place in found.items() if place == "unknown"]
    if unknown:
        raise CliError(
            f"nothing to cancel under {', '.join(map(repr, unknown))}: no such task, or it has ended; "
            "ids are printed by `diracx-task-run submit`"
        )


async def _cancel(url: str, task_ids: list[str]) -> dict[str, TaskPlace]:
    from ...operations.audited_actions import Deeds
    from ..runtime.broker import open_broker

    async with open_broker(url) as broker:
        with explained_redis(url):
            return await Deeds.at_command_line(broker.redis).cancel(broker, task_ids)
