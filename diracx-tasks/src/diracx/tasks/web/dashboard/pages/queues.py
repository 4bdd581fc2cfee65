"""The nine queues, and what waits in each."""

from __future__ import annotations

from functools import partial
from typing import Any

from .... import operations as monitor
from ....operations.cursors import queue_of
from ....plumbing.broker.streams import ALL_STREAM_NAMES
from ..page import (
    Action,
    AppContext,
    Form,
    NotFoundError,
    NotPossibleError,
    Operator,
    Page,
    Question,
    Request,
    viewer_of,
)

_PAGE = 50
_NAMES = [queue_of(name) for name in ALL_STREAM_NAMES]


async def _all(request: Request, context: AppContext) -> dict[str, Any]:
    snapshot = await context.snapshot()
    return {
        "queues": snapshot.queues,
        "sizes": {worker.size for worker in snapshot.workers if worker.alive},
        "most": max((queue.backlog for queue in snapshot.queues), default=0),
    }


async def _one(request: Request, context: AppContext) -> dict[str, Any]:
    name = request.path_params["queue"]
    snapshot = await context.snapshot()
    found = [queue for queue in snapshot.queues if queue.name == name]
    if not found:
        raise NotFoundError(f"There is no queue {name!r}.")
    look = partial(monitor.peek, context.redis, name, registry=context.registry)
    try:
        page = await viewer_of(request).page(look, _PAGE, request.query_params.get("after"))
    except ValueError as error:
        raise NotFoundError(str(error)) from error
    return {"queue": found[0], "page": page, "heading": f"Queue {name}"}


async def _ask_purge(form: Form, context: AppContext) -> Question:
    name = _checked(form)
    snapshot = await context.snapshot()
    [queue] = [queue for queue in snapshot.queues if queue.name == name]
    return Question(
        f"Remove all tasks that wait in {name}?",
        f"{queue.backlog} tasks wait there now. They will be cancelled: they will not run, will not be dead "
        "letters, and cannot be brought back. What runs goes on.",
        "Remove them",
        dangerous=True,
    )


async def _purge(form: Form, operator: Operator) -> str:
    removed = await operator.purge(_checked(form))
    return f"{removed} tasks were cancelled in {form.one('queue')}."


def _checked(form: Form) -> str:
    name = form.one("queue")
    if name not in _NAMES:
        raise NotPossibleError(f"There is no queue {name[:80]!r}.")
    return name


PAGES = [
    Page("/queues", "queues", "Queues", _all, section="Now"),
    Page("/queues/{queue}", "queue", "Queue", _one, nav="/queues"),
]
ACTIONS = [Action("/queues/purge", _ask_purge, _purge)]
