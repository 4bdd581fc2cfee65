"""Opens the task system configured by environment variables, at the first request of a DiracX application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi import HTTPException

from ...plumbing._util.passwords import mask
from ...plumbing._util.tasks import at_end_of_loop
from ...plumbing.broker import RedisStreamBroker
from ...plumbing.broker.address import REDIS_URL_VARIABLE, AddressError, redis_url_from_environment
from ...plumbing.config.reader import ConfigReader
from ...plumbing.exceptions import TaskConfigError
from ...plumbing.registry import load_task_registry
from ...plumbing.sql.databases import database_urls
from ..context import AppContext

if TYPE_CHECKING:
    from ...plumbing.persistence import TaskDB

logger = logging.getLogger(__name__)

#: An application has one event loop; tests have many.
contexts: dict[asyncio.AbstractEventLoop, asyncio.Future[AppContext]] = {}


async def context_from_environment() -> AppContext:
    """Return the context of DIRACX_TASKS_REDIS_URL, DIRACX_DB_URL_TASKDB and the configuration.

    Raises:
        HTTPException: 503, no broker is configured.
    """
    loop = asyncio.get_running_loop()
    if (opening := contexts.get(loop)) is None:
        opening = contexts[loop] = asyncio.ensure_future(open_context())
    try:
        return await asyncio.shield(opening)
    except Exception:
        # The next request tries again.
        if contexts.get(loop) is opening:
            del contexts[loop]
        raise


async def open_context() -> AppContext:
    """Open the context of the environment, until the end of the event loop."""
    url = broker_url()
    if not url:
        raise HTTPException(
            HTTPStatus.SERVICE_UNAVAILABLE, f"this application has no broker of tasks: set {REDIS_URL_VARIABLE}"
        )
    registry = load_task_registry()
    with _address_errors_as_503():
        broker = RedisStreamBroker(url)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(broker.shutdown)
        reader, task_db = ConfigReader.from_environment(registry), await _task_db(stack)
        context = AppContext(broker, registry, reader, task_db, mask(url))
        stack.push_async_callback(context.aclose)
        stack.callback(contexts.pop, asyncio.get_running_loop(), None)
        at_end_of_loop(stack.pop_all().aclose)
    return context


def broker_url() -> str | None:
    """Return the URL of the broker from the environment; None if not set.

    Raises:
        HTTPException: 503, it is invalid; the log has the reason.
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
            f"the URL of this application's broker of tasks is invalid: correct {REDIS_URL_VARIABLE}",
        ) from error


async def _task_db(stack: AsyncExitStack) -> TaskDB | None:
    """Open the database of dead letters with its own engine; None if not configured."""
    from ...plumbing.persistence import TaskDB

    try:
        url = database_urls("TaskDB").get("TaskDB")
    except TaskConfigError as error:
        logger.error("dead letters cannot be shown: %s", error)
        return None
    if not url:
        return None
    database = TaskDB(url)
    await stack.enter_async_context(database.engine_context())
    return database
