"""Options that select the Redis server, its tasks, and one of them; opens the broker and explains errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from redis.asyncio import Redis
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
from ...plumbing.base_task import BaseTask
from ...plumbing.broker import RedisStreamBroker
from ...plumbing.broker.address import (
    DEFAULT_REDIS_URL,
    AddressError,
    check_url,
    parsed,
    read_url_file,
    redis_url_from_environment,
)
from ...plumbing.broker.server_check import Role, UnusableServerError, report_changes, report_risks
from ...plumbing.broker.stored import UnreadableKeyError
from ...plumbing.enums import Size
from ...plumbing.exceptions import SendTaskError
from ...plumbing.registry import TaskRegistry
from ...plumbing.submission.client import bound_to
from ..errors import CliError, UsageProblem
from ..options import AfterOption, JsonOption, ModuleOption
from .configuration import tasks_config
from .registry import load_registry, make_task

if TYPE_CHECKING:
    from ...operations.models import Page
    from ...operations.views import View

#: Timeout of the first connection. Commands report a server that is down within 5 s.
REPLY_SECONDS = 2.0


@asynccontextmanager
async def open_broker(
    url: str, size: Size | None = None, *, role: Role | None = None
) -> AsyncIterator[RedisStreamBroker]:
    """Open a broker, after checking that its server replies; Redis errors of the block become a CliError.

    Args:
        size: size of the worker that will fetch through it.
        role: role of a service process: check the rights of its Redis user, and warn if the server may lose data.
    """
    async with AsyncExitStack() as stack:
        stack.enter_context(explained_redis(url))
        broker = RedisStreamBroker(url, worker_size=size or Size.MEDIUM)
        stack.push_async_callback(broker.shutdown)
        try:
            async with asyncio.timeout(REPLY_SECONDS):
                await broker.startup(role)
                server = await report_risks(broker.redis) if role is not None else None
        except TimeoutError:
            raise CliError(
                f"cannot reach Redis at {mask(url)}: no reply within {REPLY_SECONDS:g} s; check host and port "
                f"{'and that it speaks TLS, ' if parsed(url).tls else ''}in --redis-url or DIRACX_TASKS_REDIS_URL"
            ) from None
        if server is not None:
            reporting = asyncio.create_task(report_changes(broker.redis, server))
            stack.push_async_callback(cancel_and_wait, reporting)
        yield broker


@contextmanager
def explained_redis(url: str) -> Iterator[None]:
    """Convert Redis errors inside the block to a CliError with the remedy."""
    try:
        yield
    except AddressError as error:
        raise CliError(f"{error}; correct --redis-url or DIRACX_TASKS_REDIS_URL") from error
    except (UnreadableKeyError, UnusableServerError) as error:
        raise CliError(str(error)) from error
    except (SendTaskError, RedisError) as error:
        cause = error.__cause__ if isinstance(error, SendTaskError) else error
        raise CliError(_explain(cause, url) if isinstance(cause, RedisError) else str(error)) from error


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
    return f"{where} replied with an error: {text}; see `diracx-task-run status` and the log of the server"


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

    def connected(self) -> AbstractAsyncContextManager[RedisStreamBroker]:
        """Open a broker as `open_broker` does."""
        return open_broker(self.url)

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


@dataclass(frozen=True, kw_only=True)
class Listing(ServerAndTasks):
    """Options of commands that list tasks by pages."""

    after: AfterOption = None
    as_json: JsonOption = False

    def show(self, view: View[Any], read: Callable[..., Awaitable[Page[Any]]], **arguments: Any) -> None:
        """Print the page that `read` returns for these arguments."""
        from ..output import show  # slow to import

        page = partial(read, after=self.after, registry=self.registry, **arguments)
        show(view, self.query(page), self.as_json)


@dataclass(frozen=True, kw_only=True)
class TaskOptions(ServerAndTasks):
    """Options that select a task, its arguments and the server."""

    name: Annotated[str, typer.Argument(metavar="NAME", help="Registry name of the task: category:ClassName.")]
    args: Annotated[
        str, typer.Option("--args", metavar="JSON", help="Positional arguments, a JSON list: '\\[1, \"x\"]'.")
    ] = "[]"
    kwargs: Annotated[
        str, typer.Option("--kwargs", metavar="JSON", help='Named arguments, a JSON object: \'{"vo": "lhcb"}\'.')
    ] = "{}"

    def checked(self, *, alone: bool = False) -> CheckedTask:
        """Make the task and check its arguments; `alone`: load no other tasks if not needed."""
        url = self.url
        registry = load_registry(self.module, only=self.name if alone else None)
        name, task = make_task(registry, self.name, self.args, self.kwargs)
        return CheckedTask(name, task, registry, url)


@dataclass(frozen=True)
class CheckedTask:
    """A task with checked arguments."""

    name: str
    """Its registry name."""
    task: BaseTask
    registry: TaskRegistry
    url: str
    """URL of the server; may have a password."""

    @asynccontextmanager
    async def broker(self) -> AsyncIterator[RedisStreamBroker]:
        """Open a broker as `open_broker` does, and bind it, so that `schedule()` of tasks uses it."""
        config = tasks_config()
        async with open_broker(self.url) as broker:
            with bound_to(broker, self.registry, config):
                yield broker
