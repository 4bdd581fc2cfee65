"""`submit`: hand a task to the workers."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CliError, UsageProblem, explained_redis
from ..options import JsonOption
from ..output import echo, echo_json
from ..runtime.task_arguments import CheckedTask, TaskOptions
from .call import print_value, to_json

if TYPE_CHECKING:
    from ...plumbing.broker.models import TaskResult

#: How long the result of a task that somebody waits for is kept.
_RESULT_TTL_SECONDS = 3600


def submit(
    options: TaskOptions,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="ISO-TIME", help="Not before this time, UTC without an offset: 2030-01-31T12:00+01:00."
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the result and print it.")] = False,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Wait no longer than this; with --wait.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Submit a task to the queue of its priority and size, and print its id.

    Name and arguments are checked before anything is sent. With --wait, exits with 1 when the task failed.

    Example: diracx-task-run submit my_tasks:Greet --args '\\["world"]' --wait --timeout 30 --module my_tasks.py
    """
    if timeout is not None and not wait:
        raise UsageProblem("--timeout says how long to wait for the result; add --wait")
    at_time = _moment(at)
    labels = {"result_ttl_seconds": _RESULT_TTL_SECONDS} if wait else {}
    asyncio.run(_Submission(options.checked(alone=True), as_json).run(at_time, labels, wait, timeout))


def _moment(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageProblem(f"--at {text!r} is not a time; write it as 2030-01-31T12:00:00+01:00") from error


class _Submission:
    def __init__(self, checked: CheckedTask, as_json: bool) -> None:
        self._checked = checked
        self._name = checked.name
        self._url = checked.url
        self._as_json = as_json

    async def run(
        self, at_time: datetime | None, labels: dict[str, Any], wait: bool, timeout: float | None
    ) -> None:
        async with self._checked.broker() as broker:
            with explained_redis(self._url):
                try:
                    task_id = await self._checked.task.schedule(at_time=at_time, labels=labels)
                except (TypeError, ValueError, OverflowError) as error:
                    raise UsageProblem(f"{self._name} cannot be submitted: {error}") from error
            if not wait:
                self._report(task_id, None)
                return
            if not self._as_json:
                self._say_submitted(task_id)
            try:
                with explained_redis(self._url):
                    result = await _result_of(broker.wait_result(task_id, timeout))
            except CliError as error:
                self._report_unfinished(task_id)
                raise CliError(f"{error} (task {task_id} was submitted and goes on)") from error
        if result is None:
            self._report_unfinished(task_id)
            raise CliError(
                f"task {task_id} has not ended after {timeout:g} s; it goes on, if a worker for "
                f"{type(self._checked.task).size} tasks runs"
            )
        self._report(task_id, result)
        if result.is_err:
            failure = result.error or {}
            what = f"{failure.get('type', 'Exception')}: {failure.get('message', '')}"
            raise CliError(f"{self._name} {task_id} failed: {what}")

    def _say_submitted(self, task_id: str) -> None:
        # Scripts know this line from the published package.
        echo(f"Submitted task {self._name!r} with ID: {task_id}")

    def _report_unfinished(self, task_id: str) -> None:
        if self._as_json:
            self._report(task_id, None)

    def _report(self, task_id: str, result: TaskResult[Any] | None) -> None:
        if not self._as_json:
            if result is None:
                self._say_submitted(task_id)
            elif not result.is_err:
                print_value(result.return_value, as_json=False)
            return
        report: dict[str, Any] = {"task_id": task_id, "task_name": self._name, "state": "submitted"}
        if result is not None:
            report |= {
                "state": "failed" if result.is_err else "succeeded",
                "return_value": to_json(result.return_value),
                "error": result.error,
                "execution_time": result.execution_time,
            }
        echo_json(report)


async def _result_of(waiting: Any) -> TaskResult[Any] | None:
    """The result, None when the time was up. (redis-py's TimeoutError is no subclass of this one.)"""
    try:
        result: TaskResult[Any] = await waiting
    except TimeoutError:
        return None
    return result
