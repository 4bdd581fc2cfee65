"""The way to the broker, tried before anything is done: a dead server is reported in seconds, in one line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from ...plumbing._util.tasks import cancel_and_wait
from ..errors import CliError, explained_redis, mask

if TYPE_CHECKING:
    from ...plumbing.broker import RedisStreamBroker
    from ...plumbing.broker.server_check import Role
    from ...plumbing.enums import Size

#: A server that does not answer for so long counts as down. Users were promised an answer within 5 s.
ANSWER_SECONDS = 2.0


@asynccontextmanager
async def open_broker(
    url: str, size: Size | None = None, *, role: Role | None = None
) -> AsyncIterator[RedisStreamBroker]:
    """A broker whose server has answered.

    Args:
        size: of the worker that will fetch through it.
        role: of a process that stays: its user must have the rights, and it warns of a server that can lose tasks.

    Raises:
        CliError: when the server cannot be reached, refuses us, or is one on which the task system cannot work.
    """
    from ...plumbing.broker import RedisStreamBroker
    from ...plumbing.broker.address import parsed
    from ...plumbing.broker.server_check import report_changes, report_risks
    from ...plumbing.enums import Size

    with explained_redis(url):
        broker = RedisStreamBroker(url, worker_size=size or Size.MEDIUM)
    try:
        try:
            with explained_redis(url):
                async with asyncio.timeout(ANSWER_SECONDS):
                    await broker.startup(role)
                    server = await report_risks(broker.redis) if role is not None else None
        except TimeoutError:
            raise CliError(
                f"cannot reach Redis at {mask(url)}: no answer within {ANSWER_SECONDS:g} s; check host and port "
                f"{'and that it speaks TLS, ' if parsed(url).tls else ''}in --redis-url or DIRACX_TASKS_REDIS_URL"
            ) from None
        if server is None:
            yield broker
            return
        reporting = asyncio.create_task(report_changes(broker.redis, server))
        try:
            yield broker
        finally:
            await cancel_and_wait(reporting)
    finally:
        await broker.shutdown()
