"""The Redis server and the tasks that a command works with, as its options name them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from redis.asyncio import Redis

from ...plumbing.broker import RedisStreamBroker
from ...plumbing.broker.address import DEFAULT_REDIS_URL, REDIS_URL_FILE_VARIABLE, REDIS_URL_VARIABLE
from ...plumbing.broker.connection import AddressError, check_url, read_url_file
from ...plumbing.registry import TaskRegistry
from ..errors import CliError, UsageProblem
from ..options import ModuleOption, RedisUrlFileOption, RedisUrlOption
from .broker import explained_redis, open_broker
from .registry import load_registry

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, kw_only=True)
class Server:
    """The options that say which Redis server a command works on."""

    redis_url: RedisUrlOption = None
    redis_url_file: RedisUrlFileOption = None

    @property
    def url(self) -> str:
        """The address; errors as of `resolve_redis_url`. It may hold a password."""
        return resolve_redis_url(self.redis_url, self.redis_url_file)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[RedisStreamBroker]:
        """A broker whose server has answered; what the server refuses inside the block is a CliError."""
        url = self.url
        async with open_broker(url) as broker:
            with explained_redis(url):
                yield broker

    def run(self, work: Callable[[RedisStreamBroker], Awaitable[_Answer]]) -> _Answer:
        """Do something with a broker whose server has answered.

        Raises:
            CliError: when the server cannot be reached, or refuses.
        """

        async def run() -> _Answer:
            async with self.connected() as broker:
                return await work(broker)

        return asyncio.run(run())

    def query(self, read: Callable[[Redis], Awaitable[_Answer]]) -> _Answer:
        """Read something from the server.

        Raises:
            CliError: when the server cannot be reached, or refuses.
            UsageProblem: for what was asked for wrongly (a ValueError of what reads).
        """
        try:
            return self.run(lambda broker: read(broker.redis))
        except ValueError as error:
            raise UsageProblem(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class ServerAndTasks(Server):
    """The options that say which tasks there are beside the installed ones, and which server."""

    module: ModuleOption = None

    @cached_property
    def registry(self) -> TaskRegistry:
        """The tasks; errors as of `load_registry`."""
        return load_registry(self.module)


def resolve_redis_url(option: str | None, file: str | None = None) -> str:
    """The server's address: from the option, else the file, else the environment, else `redis://localhost`.

    Raises:
        CliError: when it cannot be the address of a server; usage when it was given as an option.
    """
    if option is not None and file is not None:
        raise UsageProblem("--redis-url and --redis-url-file say the same; give one of them")
    given = option is not None or file is not None
    in_environment = os.environ.get(REDIS_URL_VARIABLE)
    path = file if given else None if in_environment else os.environ.get(REDIS_URL_FILE_VARIABLE)
    origin = "--redis-url" if option is not None else REDIS_URL_VARIABLE
    url = option if option is not None else in_environment or DEFAULT_REDIS_URL
    try:
        if path:
            return read_url_file(path, "--redis-url-file" if given else REDIS_URL_FILE_VARIABLE)
        return check_url(url, origin)
    except AddressError as error:
        raise (UsageProblem if given else CliError)(str(error)) from error
