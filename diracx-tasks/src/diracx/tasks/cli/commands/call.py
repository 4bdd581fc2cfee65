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
from enum import StrEnum
from typing import Annotated, Any

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


class Debugger(StrEnum):
    """Time when pdb takes over."""

    NONE = "none"
    BEFORE = "before"
    EXCEPTION = "exception"


def call(
    options: TaskOptions,
    debugger: Annotated[
        Debugger,
        typer.Option(
            help="Stop in pdb before the task begins, or where it raised (its locks given back by then)."
        ),
    ] = Debugger.NONE,
    as_json: JsonOption = False,
    log_level: LogLevelOption = None,
) -> None:
    """Run a task in this process and print what it returns.

    Its structural locks are taken, its limiters are not asked. It may spawn other tasks: workers run those.

    Example: diracx-task-run call my_tasks:Greet --args '\\["world"]' --module my_tasks.py
    """
    set_up_logging(log_level)
    checked = options.checked()
    set_task_log_level(checked.registry)
    run = _Run(checked, debugger)
    # With --json, stdout is for the value alone; pdb needs it for itself.
    aside = as_json and debugger is Debugger.NONE
    try:
        with contextlib.redirect_stdout(sys.stderr) if aside else contextlib.nullcontext():
            value = asyncio.run(run.run())
    except CliError:
        if run.failure is not None and debugger is Debugger.EXCEPTION:
            import pdb

            pdb.post_mortem(run.failure.__traceback__)
        raise
    print_value(value, as_json=as_json)


def _without_secrets(text: str, task: BaseTask) -> str:
    return without_secrets(text, task)


class _Run:
    """One execution. `failure` is what the task raised."""

    def __init__(self, checked: CheckedTask, debugger: Debugger) -> None:
        self._checked = checked
        self._task = checked.task
        self._name = checked.name
        self._url = checked.url
        self._debugger = debugger
        self._began = False
        self.failure: BaseException | None = None

    async def run(self) -> Any:
        """Locks first, then dependencies; commit, then release.

        Raises:
            CliError: when it cannot begin, and with a traceback when the task raised.
        """
        try:
            return await self._run()
        except CliError:
            raise
        except UnableToAcquireLockError as error:
            if self.failure is not None:
                raise self._failed(self.failure) from error
            raise CliError(f"{self._name} cannot run now: {error}; try again when it has been released") from error
        except BdbQuit as error:
            raise CliError(f"{self._name} was ended from the debugger") from error
        except LockLostError as error:
            raise CliError(f"{self._name} was cancelled, a lock of it was lost: {error}") from error
        except Exception as error:
            if self.failure is None and isinstance(error, RedisError):
                with explained_redis(self._url):
                    raise
            if self._began:
                # The task's own exception, or that of the commit of its transaction.
                raise self._failed(self.failure or error) from error
            problem = _without_secrets(f"{type(error).__name__}: {error}", self._task)
            raise CliError(f"{self._name} cannot begin: {problem}") from error

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
                with self._patient_locks(lock_specs(locks)):
                    return await self._execute(dependencies)

    async def _execute(self, dependencies: dict[str, Any]) -> Any:
        task = self._task
        self._began = True
        try:
            if self._debugger is Debugger.BEFORE:
                breakpoint_before(task)
            return await task.execute(**dependencies)
        except Exception as error:
            self.failure = error
            raise

    @contextlib.contextmanager
    def _patient_locks(self, specs: Sequence[LockSpec]) -> Iterator[None]:
        """Keep the locks while pdb holds up the event loop, which renews them otherwise."""
        expiring = [spec for spec in specs if "ttl_ms" in spec]
        if self._debugger is not Debugger.BEFORE or not expiring:
            yield
            return

        stop = threading.Event()

        def renew() -> None:
            with sync_client(self._url) as redis:
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
        """The task's traceback, from the task's own first frame on."""
        shown = error.__traceback__
        while shown is not None and shown.tb_next is not None and shown.tb_frame.f_code.co_filename == __file__:
            shown = shown.tb_next
        detail = _without_secrets("".join(traceback.format_exception(type(error), error, shown)), self._task)
        problem = _without_secrets(f"{type(error).__name__}: {error}", self._task)
        return CliError(f"{self._name} failed: {problem}", detail=detail)


def breakpoint_before(task: BaseTask) -> None:
    """Stop in pdb; `s` through the return and into `execute`, or set a breakpoint there."""
    import pdb

    class LineDebugger(pdb.Pdb):
        def set_stepinstr(self) -> None:
            """Stop at the next line. `set_trace` of Python 3.13 asks for the next instruction: ours."""
            self.set_step()

    debugger = LineDebugger()
    shown = _without_secrets(repr(task), task)
    debugger.message(f"{shown} is about to be executed: `tbreak` in its execute(), then `c`; or `s` into it")
    debugger.set_trace(sys._getframe(1))


def _variables(missing: Sequence[str]) -> str:
    """The environment variables that provide what is missing, as `JobDB.transaction`."""
    known = {
        "transaction": lambda owner: f"DIRACX_DB_URL_{owner.upper()}",
        "no_transaction": lambda owner: f"DIRACX_DB_URL_{owner.upper()}",
        "session": lambda owner: f"DIRACX_OS_DB_{owner.upper()}",
    }
    found = []
    for name in missing:
        owner, _, method = name.rpartition(".")
        if owner == "ConfigSource":
            found.append("DIRACX_CONFIG_BACKEND_URL")
        elif method in known:
            found.append(known[method](owner))
        else:
            found.append(f"the variables of {owner}")
    return ", ".join(dict.fromkeys(found))


def to_json(value: Any) -> Any:
    """The value as JSON has it; what JSON has no notion of, as text."""
    return to_jsonable_python(value, fallback=repr, bytes_mode="base64", inf_nan_mode="strings")


def print_value(value: Any, *, as_json: bool) -> None:
    """Print what a task returned to stdout: JSON, or the line that scripts know from the published package."""
    if as_json:
        echo_json(to_json(value))
    else:
        typer.echo(f"Result: {printable(str(value))}")
