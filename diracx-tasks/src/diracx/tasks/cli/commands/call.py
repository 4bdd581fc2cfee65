"""`call`: run a task in this process."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import traceback
from bdb import BdbQuit
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Annotated, Any, Literal

import typer
from pydantic_core import to_jsonable_python
from redis.exceptions import RedisError

from ...plumbing._util.printable import printable
from ...plumbing.base_task import BaseTask
from ...plumbing.broker.connection import sync_client
from ...plumbing.broker.locking import extend_now
from ...plumbing.broker.requests import LockSpec
from ...plumbing.exceptions import LockLostError, UnableToAcquireLockError
from ...plumbing.injection.plan import compile_plan, find_missing_overrides, resolve, setup_dependency_overrides
from ...plumbing.locks import BaseLimiter, lock_specs
from ...plumbing.messages.secrets import without_secrets
from ...plumbing.standalone import holding
from ..errors import CliError
from ..options import JsonOption, LogLevelOption
from ..output import echo_json
from ..runtime.broker import explained_redis
from ..runtime.databases import check_databases
from ..runtime.logs import set_task_log_level, set_up_logging
from ..runtime.task_arguments import CheckedTask, TaskOptions


def call(
    options: TaskOptions,
    debugger: Annotated[
        Literal["none", "before", "exception"],
        typer.Option(help="Start pdb before the task, or after an exception (its locks are released by then)."),
    ] = "none",
    as_json: JsonOption = False,
    log_level: LogLevelOption = None,
) -> None:
    """Run a task in this process and print what it returns.

    Acquires its locks and skips its limiters. Tasks that it spawns are run by workers.

    Example: diracx-task-run call my_tasks:Greet --args '\\["world"]' --module my_tasks.py
    """
    set_up_logging(log_level)
    checked = options.checked()
    set_task_log_level(checked.registry)
    run = _Run(checked, debugger)
    # With --json, only the value goes to stdout; pdb needs stdout.
    redirect = as_json and debugger == "none"
    try:
        with contextlib.redirect_stdout(sys.stderr) if redirect else contextlib.nullcontext():
            value = asyncio.run(run.run())
    except CliError:
        if run.failure is not None and debugger == "exception":
            import pdb

            pdb.post_mortem(run.failure.__traceback__)
        raise
    print_value(value, as_json=as_json)


class _Run:
    """One execution of a task. `failure` is the exception that it raised."""

    def __init__(self, checked: CheckedTask, debugger: str) -> None:
        self._checked = checked
        self._task, self._name = checked.task, checked.name
        self._debugger = debugger
        self._began = False
        self.failure: BaseException | None = None

    async def run(self) -> Any:
        """Acquire locks, resolve dependencies, execute, commit, release locks."""
        try:
            return await self._run()
        except CliError:
            raise
        except UnableToAcquireLockError as error:
            if self.failure is not None:
                raise self._failed(self.failure) from error
            raise CliError(f"{self._name} cannot run now: {error}; try again when it has been released") from error
        except BdbQuit as error:
            raise CliError(f"{self._name} was stopped in the debugger") from error
        except LockLostError as error:
            raise CliError(f"{self._name} was cancelled because it lost a lock: {error}") from error
        except Exception as error:
            if self.failure is None and isinstance(error, RedisError):
                with explained_redis(self._checked.url):
                    raise
            if self._began:
                # Exception of the task, or of the commit of its transaction.
                raise self._failed(self.failure or error) from error
            problem = without_secrets(f"{type(error).__name__}: {error}", self._task)
            raise CliError(f"{self._name} cannot start: {problem}") from error

    async def _run(self) -> Any:
        plan = compile_plan(type(self._task).execute, skip_first=True)
        async with self._checked.broker() as broker, AsyncExitStack() as outer:
            overrides = {}
            if plan.parameters:
                await check_databases([plan])
                overrides = await outer.enter_async_context(setup_dependency_overrides([plan]))
                if missing := find_missing_overrides(plan, overrides):
                    raise CliError(f"{self._name} needs {', '.join(missing)}: set {_variables(missing)}")
            locks = [lock for lock in self._task.execution_locks if not isinstance(lock, BaseLimiter)]
            async with holding(locks, broker.redis), AsyncExitStack() as inner:
                dependencies = await resolve(plan, overrides, inner)
                with self._renewed_in_thread(lock_specs(locks)):
                    return await self._execute(dependencies)

    async def _execute(self, dependencies: dict[str, Any]) -> Any:
        task = self._task
        self._began = True
        try:
            if self._debugger == "before":
                breakpoint_before(task)
            return await task.execute(**dependencies)
        except Exception as error:
            self.failure = error
            raise

    @contextlib.contextmanager
    def _renewed_in_thread(self, specs: Sequence[LockSpec]) -> Iterator[None]:
        """Renew the locks from a thread while pdb blocks the event loop."""
        expiring = [spec for spec in specs if "ttl_ms" in spec]
        if self._debugger != "before" or not expiring:
            yield
            return

        stop = threading.Event()

        def renew() -> None:
            with sync_client(self._checked.url) as redis:
                while not stop.wait(min(spec["ttl_ms"] for spec in expiring) / 3000):
                    extend_now(redis, expiring)

        renewing = threading.Thread(target=renew, name="diracx-debugger-locks", daemon=True)
        renewing.start()
        try:
            yield
        finally:
            stop.set()
            renewing.join()

    def _failed(self, error: BaseException) -> CliError:
        """Make an error with the traceback of the task, without frames of this module."""
        frames = error.__traceback__
        while frames is not None and frames.tb_next is not None and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next
        detail = without_secrets("".join(traceback.format_exception(type(error), error, frames)), self._task)
        problem = without_secrets(f"{type(error).__name__}: {error}", self._task)
        return CliError(f"{self._name} failed: {problem}", detail=detail)


def breakpoint_before(task: BaseTask) -> None:
    """Start pdb before `execute`; `s` steps through the return and into it."""
    import pdb

    class LineDebugger(pdb.Pdb):
        def set_stepinstr(self) -> None:
            """Stop at the next line, not at the next instruction of this module as Python 3.13 does."""
            self.set_step()

    debugger = LineDebugger()
    shown = without_secrets(repr(task), task)
    debugger.message(f"{shown} is about to be executed: `tbreak` in its execute(), then `c`; or `s` into it")
    debugger.set_trace(sys._getframe(1))


def _variables(missing: Sequence[str]) -> str:
    """Return the environment variables that configure missing dependencies, such as `JobDB.transaction`."""
    variables = {
        "transaction": lambda owner: f"DIRACX_DB_URL_{owner.upper()}",
        "no_transaction": lambda owner: f"DIRACX_DB_URL_{owner.upper()}",
        "session": lambda owner: f"DIRACX_OS_DB_{owner.upper()}",
    }
    found = []
    for name in missing:
        owner, _, method = name.rpartition(".")
        if owner == "ConfigSource":
            found.append("DIRACX_CONFIG_BACKEND_URL")
        elif method in variables:
            found.append(variables[method](owner))
        else:
            found.append(f"the variables of {owner}")
    return ", ".join(dict.fromkeys(found))


def to_json(value: Any) -> Any:
    """Convert a value to JSON types; values without a JSON type become text."""
    return to_jsonable_python(value, fallback=repr, bytes_mode="base64", inf_nan_mode="strings")


def print_value(value: Any, *, as_json: bool) -> None:
    """Print the return value of a task to stdout, as JSON or as the published package prints it."""
    if as_json:
        echo_json(to_json(value))
    else:
        typer.echo(f"Result: {printable(str(value))}")
