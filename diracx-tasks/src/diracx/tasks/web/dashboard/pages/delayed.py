"""Page of delayed tasks."""

from __future__ import annotations

from functools import partial
from typing import Any

from .... import operations
from ....operations import DelayedTask
from ....operations.formats import number
from ....operations.views import DELAYED
from ..page import AppContext, Page, Request, viewer_of
from ..tables import Button, Link, Table, cancel_button

_PAGE = 50
_NAMES = {"at_time": "Until a time", "retry": "For a retry", "lock": "For a lock", "rate": "For quota"}


async def _load(request: Request, context: AppContext) -> dict[str, Any]:
    reason: Any = request.query_params.get("reason") or None  # checked by `delayed`
    read = partial(operations.delayed, context.redis, reason, registry=context.registry)
    page = await viewer_of(request).page(read, _PAGE, request.query_params.get("after"))
    snapshot = await context.snapshot()
    links = [Link("All", "/delayed", reason is None, sum(snapshot.delayed.values()))]
    links += [
        Link(text, f"/delayed?reason={name}", reason == name, snapshot.delayed.get(name, 0))
        for name, text in _NAMES.items()
    ]
    overdue = f"{number(snapshot.overdue)} of them are overdue: no worker or scheduler promotes them."
    return Table(
        filters=links,
        filters_label="Reason",
        notes=[overdue] if snapshot.overdue else [],
        view=DELAYED,
        rows=page.items,
        caption="By due time; tasks that wait for a lock may start earlier, when it is released.",
        after=page.after,
        actions=_actions,
    ).values()


def _actions(task: DelayedTask) -> list[Button]:
    return [cancel_button(task.task_id, f"{task.task_name}, delayed ({task.reason}) for {task.queue}")]


PAGES = [Page("/delayed", "delayed", "Delayed", _load, section="Monitoring", per_vo=True)]
