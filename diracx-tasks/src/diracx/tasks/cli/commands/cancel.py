"""`cancel`: cancel tasks in any state."""

from __future__ import annotations

from typing import Annotated

import typer

from ...operations.audited_actions import AuditedActions
from ..errors import CliError, one_line
from ..options import JsonOption
from ..output import echo, echo_json
from ..runtime.server import Server


def cancel(
    *,
    task_ids: Annotated[
        list[str], typer.Argument(metavar="ID", help="Task ids, as `submit` and `schedule()` give them.")
    ],
    as_json: JsonOption = False,
    server: Server,
) -> None:
    """Cancel tasks: queued, delayed, retrying, waiting for a lock, or running.

    Prints where each was found. A task that has not begun is gone at once; a running one is cancelled by its
    worker within about a second. It is not retried and becomes no dead letter. Exits with 1 when an id is unknown:
    there never was such a task, or it has ended.

    Example: diracx-task-run cancel 0f3c6dd2a7b84c0e9a3c5b1d8e7f6a90
    """
    ids = list(dict.fromkeys(task_ids))
    found = server.run(lambda broker: AuditedActions.at_command_line(broker.redis).cancel(broker, ids))
    if as_json:
        echo_json([{"task_id": task, "found": str(place)} for task, place in found.items()])
    else:
        for task, place in found.items():
            echo(f"{one_line(task)}  {place}")
    unknown = [task for task, place in found.items() if place == "unknown"]
    if unknown:
        raise CliError(
            f"nothing to cancel under {', '.join(map(repr, unknown))}: no such task, or it has ended; "
            "ids are printed by `diracx-task-run submit`"
        )
