"""Executes tasks under their locks without a worker, and holds locks in any code."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from .base_task import current_locks
from .broker import locking
from .custom_locks import acquire_custom
from .exceptions import LockLostError, UnableToAcquireLockError
from .locks import SAFETY_MARGIN, BaseLimiter, BaseLock, is_custom, lock_specs, needed
from .messages.arguments import rebuild

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from .base_task import BaseTask
    from .broker.requests import LockSpec

logger = logging.getLogger(__name__)


@asynccontextmanager
async def holding(locks: Iterable[BaseLock], redis: Redis, *, renew: bool = True) -> AsyncIterator[None]:
    """Hold and renew locks inside the block, for code outside a worker.

    Args:
        renew: False if the caller renews them.

    Raises:
        UnableToAcquireLockError: one of them is held by another owner; none is acquired.
        LockLostError: one was lost; the block is cancelled.
    """
    enabled = needed(locks)
    custom = [lock for lock in enabled if is_custom(type(lock))]
    specs = lock_specs(enabled)
    reserved_after = asyncio.get_running_loop().time()
    token = await locking.acquire(redis, specs) if specs else None
    if specs and token is None:
        names = ", ".join(spec["key"] for spec in specs)
        raise UnableToAcquireLockError(f"held by another owner: {names}")
    for lock in enabled:
        lock.token = token
    before = current_locks.get()
    current_locks.set(enabled)
    try:
        async with _keep_renewed(redis, specs if renew else (), reserved_after), AsyncExitStack() as stack:
            if custom and (refused := await acquire_custom(stack, custom, redis, logger.error)):
                raise UnableToAcquireLockError(refused)
            yield
    finally:
        current_locks.set(before)
        if specs:
            try:
                await locking.release(redis, specs)
            except RedisError as error:
                logger.warning("cannot release locks, which will expire: %s", error)


async def task_wrapper(
    cls: type[BaseTask], *args: Any, _redis: Redis, _interactive: bool = False, **kwargs: Any
) -> Any:
    """Build a task from its arguments and execute it under its locks.

    Args:
        args: arguments of the task, as decoded from a message.
        _redis: server of the locks.
        _interactive: skip limiters (`diracx-task-run call`).
        kwargs: dependencies of `execute`.

    Raises:
        UnableToAcquireLockError: a lock is held by another owner.
    """
    task = rebuild(cls, args, {})
    locks = [lock for lock in task.execution_locks if not (_interactive and isinstance(lock, BaseLimiter))]
    async with holding(locks, _redis):
        return await task.execute(**kwargs)


def wrap_task(cls: type[BaseTask]) -> Callable[..., Any]:
    """Make `task_wrapper` for one class, with the signature of its `execute` for dependency injection."""

    @functools.wraps(cls.execute)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        return await task_wrapper(cls, *args, **kwargs)

    parameters = list(inspect.signature(cls.execute).parameters.values())[1:]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by inspect
    wrapped.__name__, wrapped.__qualname__ = cls.__name__, cls.__qualname__
    return wrapped


@asynccontextmanager
async def _keep_renewed(redis: Redis, locks: Sequence[LockSpec], reserved_after: float) -> AsyncIterator[None]:
    """Renew locks inside the block, which is cancelled when one is lost.

    Args:
        reserved_after: time of the event loop before the server granted them.

    Raises:
        LockLostError: a lock could not be renewed.
    """
    expiring = [lock for lock in locks if "ttl_ms" in lock]
    if not expiring:
        yield
        return
    block = asyncio.current_task()
    assert block is not None
    lost: list[str] = []
    loop = asyncio.get_running_loop()
    shortest_seconds = min(lock["ttl_ms"] for lock in expiring) / 1000
    term_seconds = (1 - SAFETY_MARGIN) * shortest_seconds
    expires_at = reserved_after + term_seconds

    async def renew() -> None:
        nonlocal expires_at
        while not lost:
            await asyncio.sleep(min(shortest_seconds / 3, expires_at - loop.time()))
            try:
                async with asyncio.timeout_at(expires_at):
                    started = loop.time()
                    kept = await locking.extend(redis, expiring)
            except (RedisError, TimeoutError) as error:
                logger.warning("cannot renew locks: %s", error or "no reply in time")
                kept = [loop.time() < expires_at] * len(expiring)
            else:
                expires_at = started + term_seconds
            lost.extend(lock["key"] for lock, extended in zip(expiring, kept, strict=True) if not extended)
        block.cancel()

    renewal = asyncio.create_task(renew())
    try:
        yield
        if loop.time() >= expires_at:  # the event loop was blocked, so that the block was not cancelled
            names = ", ".join(lock["key"] for lock in expiring)
            raise LockLostError(f"could not be renewed in time, and may have another owner: {names}")
    except asyncio.CancelledError:
        if not lost:
            raise
        block.uncancel()
        raise LockLostError(f"could not be renewed: {', '.join(lost)}") from None
    finally:
        renewal.cancel()
