"""Page of delayed tasks."""

from __future__ import annotations

from functools import partial
from typing import Any

from .... import operations
from ....operations import DELAY_REASONS, DelayedTask
from ....operations.views import DELAYED
from ..page import AppContext, NotFoundError, Page, Request, viewer_of
from ..rendering import number
from ..tables import Button, Link, Table, TablePage

_PAGE = 50
_NAMES = {"at_time": "Until a time", "retry": "For a retry", "lock": "For a lock", "rate": "For quota"}


async def _load(request: Request, context: AppContext) -> dict[str, Any]:
    reason = request.query_params.get("reason") or None
    if reason is not None and reason not in DELAY_REASONS:
        raise NotFoundError(f"Tasks are not delayed for {reason[:40]!r}.")
    read = partial(operations.delayed, context.redis, reason, registry=context.registry)
    page = await viewer_of(request).page(read, _PAGE, request.query_params.get("after"))
    snapshot = await context.snapshot()
    links = [Link("All", "/delayed", reason is None, sum(snapshot.delayed.values()))]
    links += [
        Link(text, f"/delayed?reason={name}", reason == name, snapshot.delayed.get(name, 0))
        for name, text in _NAMES.items()
    ]
    overdue = f"{number(snapshot.overdue)} of them are overdue: no worker or scheduler promotes them."
    return TablePage(
        filters=links,
        filters_label="Reason",
        notes=[overdue] if snapshot.overdue else [],
        table=Table(
            view=DELAYED,
            rows=page.items,
            caption="By due time; tasks that wait for a lock may start earlier, when it is released.",
            after=page.after,
            actions=_actions,
        ),
    ).values()


def _actions(task: DelayedTask) -> list[Button]:
    fields = {"task": task.task_id, "about": f"{task.task_name}, delayed ({task.reason}) for {task.queue}"}
    return [Button("/tasks/cancel", "Cancel", fields, f"cancel-{task.task_id}")]


PAGES = [Page("/delayed", "delayed", "Delayed", _load, section="Monitoring", per_vo=True)]
