"""`submit`: submit a task to its queue."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Annotated, Any

import typer

from ...plumbing.broker.models import TaskResult
from ..errors import CliError, UsageProblem
from ..options import JsonOption
from ..output import echo, echo_json
from ..runtime.broker import explained_redis
from ..runtime.task_arguments import CheckedTask, TaskOptions
from .call import print_value, to_json

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
    at_time = _moment(at)
    checked = options.checked(alone=True)
    asyncio.run(_submit(checked, at_time, wait, timeout, as_json))


def _moment(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageProblem(f"--at {text!r} is not a time; write it as 2030-01-31T12:00:00+01:00") from error


async def _submit(
    checked: CheckedTask, at_time: datetime | None, wait: bool, timeout: float | None, as_json: bool
) -> None:
    labels = {"result_ttl_seconds": _RESULT_TTL_SECONDS} if wait else {}
    async with checked.broker() as broker:
        with explained_redis(checked.url):
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
            "return_value": to_json(result.return_value),
            "error": result.error,
            "execution_time": result.execution_time,
        }
        echo_json(report | state)
    elif not result.is_err:
        print_value(result.return_value, as_json=False)
    if result.is_err:
        failure = result.error or {}
        what = f"{failure.get('type', 'Exception')}: {failure.get('message', '')}"
        raise CliError(f"{report['task_name']} {report['task_id']} failed: {what}")
