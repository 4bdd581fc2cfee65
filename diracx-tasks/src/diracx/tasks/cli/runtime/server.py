"""Options that select the Redis server and the task modules of a command."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, TypeVar

import typer
from redis.asyncio import Redis

from ...plumbing.broker import RedisStreamBroker
from ...plumbing.broker.address import DEFAULT_REDIS_URL, redis_url_from_environment
from ...plumbing.broker.connection import AddressError, check_url, read_url_file
from ...plumbing.registry import TaskRegistry
from ..errors import CliError, UsageProblem
from ..options import ModuleOption
from .broker import explained_redis, open_broker
from .registry import load_registry

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Server:
    """Options that select the Redis server."""

    redis_url: Annotated[
        str | None,
        typer.Option(
            "--redis-url",
            metavar="URL",
            help="Redis or Valkey server; else DIRACX_TASKS_REDIS_URL, else redis://localhost. "
            "Every user of the host can see a password in it: use the variable or a file instead.",
        ),
    ] = None
    redis_url_file: Annotated[
        str | None,
        typer.Option(
            "--redis-url-file",
            metavar="FILE",
            help="File with the URL, for one with a password; else DIRACX_TASKS_REDIS_URL_FILE.",
        ),
    ] = None

    @property
    def url(self) -> str:
        """The URL, which may have a password: of an option, else of the environment, else `redis://localhost`."""
        given = self.redis_url is not None or self.redis_url_file is not None
        try:
            if self.redis_url is not None and self.redis_url_file is not None:
                raise AddressError("--redis-url and --redis-url-file exclude each other; give one of them")
            if self.redis_url is not None:
                return check_url(self.redis_url, "--redis-url")
            if self.redis_url_file is not None:
                return read_url_file(self.redis_url_file, "--redis-url-file")
            return redis_url_from_environment() or DEFAULT_REDIS_URL
        except AddressError as error:
            raise (UsageProblem if given else CliError)(str(error)) from error

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[RedisStreamBroker]:
        """Open a broker as `open_broker` does; Redis errors inside the block become a CliError."""
        url = self.url
        async with open_broker(url) as broker:
            with explained_redis(url):
                yield broker

    def run(self, work: Callable[[RedisStreamBroker], Awaitable[_Result]]) -> _Result:
        """Call `work` with an open broker."""

        async def run() -> _Result:
            async with self.connected() as broker:
                return await work(broker)

        return asyncio.run(run())

    def query(self, read: Callable[[Redis], Awaitable[_Result]]) -> _Result:
        """Call `read` with a client of the server; its ValueError becomes a UsageProblem."""
        try:
            return self.run(lambda broker: read(broker.redis))
        except ValueError as error:
            raise UsageProblem(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class ServerAndTasks(Server):
    """Options that select the Redis server and modules of tasks."""

    module: ModuleOption = None

    @cached_property
    def registry(self) -> TaskRegistry:
        """The tasks; errors as of `load_registry`."""
        return load_registry(self.module)
