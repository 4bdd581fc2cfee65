"""`call` and `submit`: run a task in this process, or submit it to its queue."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
import traceback
from bdb import BdbQuit
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from typing import Annotated, Any, Literal

import typer
from pydantic_core import to_jsonable_python

from ...plumbing._util.printable import printable
from ...plumbing.base_task import BaseTask
from ...plumbing.broker.connection import sync_client
from ...plumbing.broker.locking import extend_now
from ...plumbing.broker.models import TaskResult
from ...plumbing.broker.requests import LockSpec
from ...plumbing.exceptions import LockLostError, UnableToAcquireLockError
from ...plumbing.injection.placeholders import Call, find_missing_overrides
from ...plumbing.injection.plan import Plan, compile_plan, resolve
from ...plumbing.injection.providers import setup_dependency_overrides
from ...plumbing.locks import BaseLimiter, lock_specs
from ...plumbing.messages.secrets import without_secrets
from ...plumbing.standalone import holding
from ..errors import CliError, UsageProblem
from ..options import JsonOption, LogLevelOption
from ..output import echo, echo_json
from ..runtime.databases import check_databases
from ..runtime.logs import set_task_log_level, set_up_logging
from ..runtime.server import CheckedTask, TaskOptions, explained_redis

#: Method of a database -> prefix of the environment variable of the database.
_VARIABLES = {"transaction": "DIRACX_DB_URL_", "no_transaction": "DIRACX_DB_URL_", "session": "DIRACX_OS_DB_"}


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
    # With --json, only the value goes to stdout; pdb needs stdout.
    redirect = as_json and debugger == "none"
    try:
        with contextlib.redirect_stdout(sys.stderr) if redirect else contextlib.nullcontext():
            value = asyncio.run(_run(checked, debugger))
    except _TaskFailedError as error:
        if debugger == "exception" and error.__cause__ is not None:
            import pdb

            pdb.post_mortem(error.__cause__.__traceback__)
        raise
    if as_json:
        echo_json(_to_json(value))
    else:
        typer.echo(f"Result: {printable(str(value))}")  # as the published package does


class _TaskFailedError(CliError):
    """The task failed, or the commit of its transaction. Has its traceback, without frames of this module."""

    def __init__(self, checked: CheckedTask, error: Exception) -> None:
        frames = error.__traceback__
        while frames is not None and frames.tb_next is not None and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next
        problem = without_secrets(f"{type(error).__name__}: {error}", checked.task)
        detail = without_secrets("".join(traceback.format_exception(type(error), error, frames)), checked.task)
        super().__init__(f"{checked.name} failed: {problem}", detail=detail)


async def _run(checked: CheckedTask, debugger: str) -> Any:
    """Acquire locks, resolve dependencies, execute, commit, release locks."""
    task, name = checked.task, checked.name
    try:
        plan = compile_plan(type(task).execute, skip_first=True)
        async with checked.broker() as broker, AsyncExitStack() as stack:
            overrides = {}
            if plan.parameters:
                await check_databases([plan])
                overrides = await stack.enter_async_context(setup_dependency_overrides([plan]))
                if missing := find_missing_overrides(plan, overrides):
                    variables = ", ".join(dict.fromkeys(map(_variable, missing)))
                    raise CliError(f"{name} needs {', '.join(missing)}: set {variables}")
            locks = [lock for lock in task.execution_locks if not isinstance(lock, BaseLimiter)]
            at_prompt = debugger == "before"
            async with holding(locks, broker.redis, renew=not at_prompt):
                if at_prompt:
                    _renew_in_thread(lock_specs(locks), checked.url)
                return await _execute(checked, plan, overrides, at_prompt)
    except CliError:
        raise
    except UnableToAcquireLockError as error:
        raise CliError(f"{name} cannot run now: {error}; try again when it has been released") from error
    except LockLostError as error:
        raise CliError(f"{name} was cancelled because it lost a lock: {error}") from error
    except Exception as error:
        problem = without_secrets(f"{type(error).__name__}: {error}", task)
        raise CliError(f"{name} cannot start: {problem}") from error


async def _execute(checked: CheckedTask, plan: Plan, overrides: dict[Call, Call], at_prompt: bool) -> Any:
    task, began = checked.task, False  # `task` can be inspected at the prompt
    try:
        async with AsyncExitStack() as stack:
            dependencies = await resolve(plan, overrides, stack)
            began = True
            if at_prompt:
                breakpoint_before(task)
            return await task.execute(**dependencies)
    except BdbQuit as error:
        raise CliError(f"{checked.name} was stopped in the debugger") from error
    except Exception as error:
        if not began:
            raise
        raise _TaskFailedError(checked, error) from error


def _renew_in_thread(specs: Sequence[LockSpec], url: str) -> None:
    """Renew the locks from a thread until the process ends, also while pdb blocks the event loop."""
    expiring = [spec for spec in specs if "ttl_ms" in spec]

    def renew() -> None:
        with sync_client(url) as redis:
            while expiring:
                time.sleep(min(spec["ttl_ms"] for spec in expiring) / 3000)
                extend_now(redis, expiring)

    threading.Thread(target=renew, name="diracx-debugger-locks", daemon=True).start()


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


def _variable(missing: str) -> str:
    """Return the environment variable that configures a missing dependency, such as `JobDB.transaction`."""
    owner, _, method = missing.rpartition(".")
    if owner == "ConfigSource":
        return "DIRACX_CONFIG_BACKEND_URL"
    return f"{_VARIABLES[method]}{owner.upper()}" if method in _VARIABLES else f"the variables of {owner}"


def _to_json(value: Any) -> Any:
    """Convert a value to JSON types; values without a JSON type become text."""
    return to_jsonable_python(value, fallback=repr, bytes_mode="base64", inf_nan_mode="strings")


#: Time to live of the result with --wait.
_RESULT_TTL_SECONDS = 3600


def submit(
    *,
    options: TaskOptions,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="ISO-TIME", help="Earliest start, as 2030-01-31T12:00+01:00; UTC if it has no offset."
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the result and print it.")] = False,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Maximum time to wait; with --wait.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Submit a task to the queue of its priority and size, and print its id.

    Name and arguments are checked before the submission. With --wait, exits with 1 if the task failed.

    Example: diracx-task-run submit my_tasks:Greet --args '\\["world"]' --wait --timeout 30 --module my_tasks.py
    """
    if timeout is not None and not wait:
        raise UsageProblem("--timeout has no effect without --wait; add --wait")
    try:
        at_time = None if at is None else datetime.fromisoformat(at)
    except ValueError as error:
        raise UsageProblem(f"--at {at!r} is not a time; write it as 2030-01-31T12:00:00+01:00") from error
    checked = options.checked(alone=True)
    asyncio.run(_submit(checked, at_time, wait, timeout, as_json))


async def _submit(
    checked: CheckedTask, at_time: datetime | None, wait: bool, timeout: float | None, as_json: bool
) -> None:
    labels = {"result_ttl_seconds": _RESULT_TTL_SECONDS} if wait else {}
    async with checked.broker() as broker:
        try:
            task_id = await checked.task.schedule(at_time=at_time, labels=labels)
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageProblem(f"{checked.name} cannot be submitted: {error}") from error
        report = {"task_id": task_id, "task_name": checked.name, "state": "submitted"}
        if not as_json:
            # Scripts parse this line, which is that of the published package.
            echo(f"Submitted task {checked.name!r} with ID: {task_id}")
        elif not wait:
            echo_json(report)
        if not wait:
            return
        try:
            with explained_redis(checked.url):
                result = await broker.wait_result(task_id, timeout)
        except (CliError, TimeoutError) as error:  # redis-py's TimeoutError is no subclass of this one
            if as_json:
                echo_json(report)
            if isinstance(error, CliError):
                raise CliError(f"{error} (task {task_id} was submitted and continues)") from error
            raise CliError(
                f"task {task_id} has not ended after {timeout:g} s; it continues, if a worker of size "
                f"{type(checked.task).size} runs"
            ) from error
    _report_result(result, report, as_json)


def _report_result(result: TaskResult[Any], report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        state = {
            "state": "failed" if result.is_err else "succeeded",
            "return_value": _to_json(result.return_value),
            "error": result.error,
            "execution_time": result.execution_time,
        }
        echo_json(report | state)
    elif not result.is_err:
        typer.echo(f"Result: {printable(str(result.return_value))}")
    if result.is_err:
        failure = result.error or {}
        what = f"{failure.get('type', 'Exception')}: {failure.get('message', '')}"
        raise CliError(f"{report['task_name']} {report['task_id']} failed: {what}")
