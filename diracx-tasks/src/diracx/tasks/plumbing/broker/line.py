"""A connection for one caller at a time, beside the pool: the shortest way to the server and back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

if TYPE_CHECKING:
    from redis.asyncio import Redis


class Line:
    """Commands that are sent together and answered one after the other, as a pipeline's.

    Args:
        redis: the client whose server it leads to, and whose `socket_timeout` holds for all answers of a call.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._pool: Any = redis.connection_pool
        self._connection: Any = None
        self.busy = False
        """Whether somebody waits for an answer."""

    async def ask(self, *commands: Sequence[Any]) -> list[Any]:
        """The answers as the server gave them, refusals among them as exceptions.

        Raises:
            redis.exceptions.RedisError: when the server does not answer. Some commands may have been executed
                then, as they may when this is cancelled.
        """
        self.busy = True
        if self._connection is None:
            self._connection = self._pool.make_connection()
            # One limit for all of it is ours; redis-py has one, and a task of asyncio, for each time it sends.
            self._connection.socket_timeout = None
        try:
            async with asyncio.timeout(self._pool.connection_kwargs.get("socket_timeout")):
                await self._pool.ensure_connection(self._connection)
                return await self._ask(commands)
        except TimeoutError:
            raise RedisTimeoutError("no answer in time") from None
        finally:
            self.busy = False

    async def _ask(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        answers: list[Any] = []
        try:
            await self._connection.send_packed_command(self._connection.pack_commands(commands))
            for _ in commands:
                try:
                    answers.append(await self._connection.read_response())
                except ResponseError as refusal:
                    answers.append(refusal)
        except BaseException:
            await self.close()  # or others would get what is still answered
            raise
        return answers

    async def execute_command(self, *command: Any) -> Any:
        """The answer to one command, as the client gives it. Others go by the pool while this is in use.

        Raises:
            redis.exceptions.RedisError: when the server refuses, or does not answer.
        """
        if self.busy:
            return await self._redis.execute_command(*command)
        [answer] = await self.ask(command)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def close(self) -> None:
        """Close the connection; the next call opens one."""
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)
            # Both event loops close a transport in their next round. Nothing may be asked before that: the server
            # could still do what was sent here, and nobody would hear of it.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
