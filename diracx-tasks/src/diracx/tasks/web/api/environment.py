"""Opens the task system of the environment for a DiracX application, at the first request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from fastapi import HTTPException

from ...plumbing._util.passwords import mask
from ...plumbing.broker import RedisStreamBroker
from ...plumbing.broker.address import REDIS_URL_VARIABLE, AddressError, redis_url_from_environment
from ...plumbing.config.sources import ConfigReader
from ...plumbing.exceptions import TaskConfigError
from ...plumbing.registry import load_task_registry
from ...plumbing.sql.databases import database_urls
from ..context import AppContext

if TYPE_CHECKING:
    from ...plumbing.persistence import TaskDB

logger = logging.getLogger(__name__)

#: An application has one event loop; tests have many.
_of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Future[AppContext]] = WeakKeyDictionary()
#: Databases go with the process, as the broker's connections do. An engine that nobody holds open is disposed of.
_left_open: WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncExitStack] = WeakKeyDictionary()


async def context_of_environment() -> AppContext:
    """Context of the sources that DIRACX_TASKS_REDIS_URL, DIRACX_DB_URL_TASKDB and the configuration name.

    Raises:
        HTTPException: 503, when no broker is named.
    """
    loop = asyncio.get_running_loop()
    if (opening := _of_loop.get(loop)) is None:
        opening = _of_loop[loop] = asyncio.ensure_future(_open())
    try:
        return await asyncio.shield(opening)
    except Exception:
        # The next request tries again: once, however many have waited for this.
        if _of_loop.get(loop) is opening:
            del _of_loop[loop]
        raise


async def _open() -> AppContext:
    url = broker_url()
    if not url:
        raise HTTPException(
            HTTPStatus.SERVICE_UNAVAILABLE, f"this application knows no broker of tasks: set {REDIS_URL_VARIABLE}"
        )
    registry = load_task_registry()
    with _address_errors_as_503():
        broker = RedisStreamBroker(url)
    return AppContext(broker, registry, ConfigReader.of_environment(registry), await _task_db(), mask(url))


def broker_url() -> str | None:
    """The address of the broker, as the environment has it; None when it names none.

    Raises:
        HTTPException: 503, when it is no address; the log says why.
    """
    with _address_errors_as_503():
        return redis_url_from_environment()


@contextmanager
def _address_errors_as_503() -> Iterator[None]:
    try:
        yield
    except AddressError as error:
        logger.error("%s", error)
        raise HTTPException(
            HTTPStatus.SERVICE_UNAVAILABLE,
            f"the address of this application's broker of tasks cannot be used: correct {REDIS_URL_VARIABLE}",
        ) from error


async def _task_db() -> TaskDB | None:
    """The dead letters. An engine of our own: an application without this database must start as well."""
    from ...plumbing.persistence import TaskDB

    try:
        url = database_urls("TaskDB").get("TaskDB")
    except TaskConfigError as error:
        logger.error("dead letters cannot be shown: %s", error)
        return None
    if not url:
        return None
    database = TaskDB(url)
    stack = AsyncExitStack()
    await stack.enter_async_context(database.engine_context())
    _left_open[asyncio.get_running_loop()] = stack
    return database
