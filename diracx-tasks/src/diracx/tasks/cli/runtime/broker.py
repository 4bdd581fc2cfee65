"""Opens the broker of a command, after checking that the server replies, and explains Redis errors in one line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    InvalidResponse,
    NoPermissionError,
    RedisError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ...plumbing._util.passwords import mask
from ...plumbing._util.retrying import NO_PRIMARY, reason
from ...plumbing._util.tasks import cancel_and_wait
from ...plumbing.broker import RedisStreamBroker
from ...plumbing.broker.address import AddressError, parsed
from ...plumbing.broker.server_check import Role, UnusableServerError, report_changes, report_risks
from ...plumbing.broker.stored import UnreadableKeyError
from ...plumbing.enums import Size
from ...plumbing.exceptions import SendTaskError
from ..errors import CliError

#: Timeout of the first connection. Commands report a server that is down within 5 s.
REPLY_SECONDS = 2.0


@asynccontextmanager
async def open_broker(
    url: str, size: Size | None = None, *, role: Role | None = None
) -> AsyncIterator[RedisStreamBroker]:
    """Open a broker, after checking that its server replies.

    Args:
        size: size of the worker that will fetch through it.
        role: role of a service process: check the rights of its Redis user, and warn if the server may lose data.
    """
    with explained_redis(url):
        broker = RedisStreamBroker(url, worker_size=size or Size.MEDIUM)
    try:
        try:
            with explained_redis(url):
                async with asyncio.timeout(REPLY_SECONDS):
                    await broker.startup(role)
                    server = await report_risks(broker.redis) if role is not None else None
        except TimeoutError:
            raise CliError(
                f"cannot reach Redis at {mask(url)}: no reply within {REPLY_SECONDS:g} s; check host and port "
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


@contextmanager
def explained_redis(url: str) -> Iterator[None]:
    """Convert Redis errors inside the block to a CliError with the remedy."""
    try:
        yield
    except AddressError as error:
        raise CliError(f"{error}; correct --redis-url or DIRACX_TASKS_REDIS_URL") from error
    except (UnreadableKeyError, UnusableServerError) as error:
        raise CliError(str(error)) from error
    except SendTaskError as error:
        if isinstance(error.__cause__, RedisError):
            raise CliError(_explain(error.__cause__, url)) from error
        raise CliError(str(error)) from error
    except RedisError as error:
        raise CliError(_explain(error, url)) from error


def _explain(error: BaseException, url: str) -> str:
    text = reason(error)
    where = f"Redis at {mask(url)}"
    if isinstance(error, AuthenticationError | AuthorizationError) or text.startswith(("NOAUTH", "WRONGPASS")):
        return (
            f"{where} refuses the user or the password: {text}; "
            "check them in --redis-url or DIRACX_TASKS_REDIS_URL"
        )
    if isinstance(error, NoPermissionError):
        return f"{where} denies its user the permission: {text}; give the user the rights on diracx:*"
    if isinstance(error, InvalidResponse):
        return f"the server at {mask(url)} is not Redis ({text}); check host and port of the URL"
    if "DB index" in text:
        return f"{where} has no such database: {text}; correct the number at the end of the URL"
    if isinstance(error, RedisConnectionError | RedisTimeoutError):
        if isinstance(error, NO_PRIMARY):
            remedy = "check the sentinels' hosts and ports, and the name of the service"
        elif "CERTIFICATE_VERIFY_FAILED" in text:
            remedy = "give its CA with ?ssl_ca_certs=FILE, and the host name that is in its certificate"
        else:
            remedy = (
                "start it, or give another one with --redis-url or DIRACX_TASKS_REDIS_URL (`diracx-task-run dev` "
                "starts its own)"
            )
        return f"cannot reach {where}: {text}; {remedy}"
    return f"{where} replied with an error: {text}; check --redis-url or DIRACX_TASKS_REDIS_URL"
