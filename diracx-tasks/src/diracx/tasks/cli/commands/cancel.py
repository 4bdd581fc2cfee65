"""`cancel`: cancel tasks in any state."""

from __future__ import annotations

from typing import Annotated

import typer

from ...operations.audited_actions import AuditedActions
from ..errors import CliError, one_line
from ..options import JsonOption
from ..output import report
from ..runtime.server import Server


def cancel(
    *,
    task_ids: Annotated[
        list[str], typer.Argument(metavar="ID", help="Task ids, as returned by `submit` and `schedule()`.")
    ],
    as_json: JsonOption = False,
    server: Server,
) -> None:
    """Cancel tasks: queued, delayed, retrying, waiting for a lock, or running.

    Prints the state in which each was found. Waiting tasks are removed immediately; a running task is cancelled by
    its worker within about a second, is not retried and does not become a dead letter. Exits with 1 if an id is
    unknown: the task has ended or never existed.

    Example: diracx-task-run cancel 0f3c6dd2a7b84c0e9a3c5b1d8e7f6a90
    """
    ids = list(dict.fromkeys(task_ids))
    found = server.run(lambda broker: AuditedActions.for_command_line(broker.redis).cancel(broker, ids))
    records = [{"task_id": task, "found": str(place)} for task, place in found.items()]
    report(records, (f"{one_line(task)}  {place}" for task, place in found.items()), as_json)
    unknown = [task for task, place in found.items() if place == "unknown"]
    if unknown:
        raise CliError(
            f"nothing to cancel under {', '.join(map(repr, unknown))}: no such task, or it has ended; "
            "`diracx-task-run submit` prints ids"
        )
