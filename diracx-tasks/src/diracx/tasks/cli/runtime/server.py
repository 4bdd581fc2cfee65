"""Options that select the Redis server and the task modules of a command."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, TypeVar

import typer
from redis.asyncio import Redis

from ...plumbing.broker import RedisStreamBroker
from ...plumbing.broker.address import DEFAULT_REDIS_URL, REDIS_URL_FILE_VARIABLE, REDIS_URL_VARIABLE
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
        """The URL, which may have a password; errors as of `resolve_redis_url`."""
        return resolve_redis_url(self.redis_url, self.redis_url_file)

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


def resolve_redis_url(option: str | None, file: str | None = None) -> str:
    """Resolve the server's URL: from the option, else the file, else the environment, else `redis://localhost`."""
    if option is not None and file is not None:
        raise UsageProblem("--redis-url and --redis-url-file exclude each other; give one of them")
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
