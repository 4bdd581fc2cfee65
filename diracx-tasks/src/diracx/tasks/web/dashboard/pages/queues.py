"""Pages of the nine queues and their waiting tasks, with an action to purge a queue."""

from __future__ import annotations

from functools import partial
from typing import Any

from .... import operations
from ....operations import QueuedTask
from ....operations.cursors import queue_of
from ....operations.formats import duration, number
from ....operations.views import QUEUED, QUEUES
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
from ..tables import Button, Fact, Table, cancel_button

_PAGE = 50
_NAMES = [queue_of(name) for name in ALL_STREAM_NAMES]


async def _all(request: Request, context: AppContext) -> dict[str, Any]:
    snapshot = await context.snapshot()
    served = {worker.size for worker in snapshot.workers if worker.alive}
    unserved = {queue.size for queue in snapshot.queues if queue.backlog} - served
    notes = [
        f"Tasks wait, and no worker of size {size} runs: `diracx-task-run worker --worker-size {size}`"
        for size in sorted(unserved)
    ]
    caption = "By priority; a worker runs tasks of its size."
    return Table(view=QUEUES, rows=snapshot.queues, caption=caption, notes=notes).values()


async def _one(request: Request, context: AppContext) -> dict[str, Any]:
    name = request.path_params["queue"]
    snapshot = await context.snapshot()
    queue = next((queue for queue in snapshot.queues if queue.name == name), None)
    if queue is None:
        raise NotFoundError(f"No queue {name!r}.")
    read = partial(operations.peek, context.redis, name, registry=context.registry)
    page = await viewer_of(request).page(read, _PAGE, request.query_params.get("after"))
    purge = Button("/queues/purge", "Cancel all waiting tasks…", {"queue": name}, "purge", "danger")
    return Table(
        facts=[
            Fact("Waiting", number(queue.backlog)),
            Fact("Running", number(queue.running), "/running"),
            Fact("Oldest waiting", duration(queue.oldest_waiting_seconds)),
            Fact("In", number(queue.in_per_second), small="per second"),
            Fact("Out", number(queue.out_per_second), small="per second"),
        ],
        view=QUEUED,
        rows=page.items,
        caption="In the order of delivery.",
        after=page.after,
        actions=_actions,
        buttons=[purge] if page.items else [],
    ).values(parent=("/queues", "Queues"), heading=name)


def _actions(task: QueuedTask) -> list[Button]:
    if not task.task_id:
        return []
    return [cancel_button(task.task_id, f"{task.task_name}, waiting in {task.queue}")]


async def _ask_purge(form: Form, context: AppContext) -> Question:
    name = _checked(form)
    snapshot = await context.snapshot()
    [queue] = [queue for queue in snapshot.queues if queue.name == name]
    return Question(
        f"Cancel all tasks that wait in {name}?",
        f"{queue.backlog} tasks wait now. They will not run and not become dead letters; this cannot be undone. "
        "Running tasks continue.",
        "Cancel them",
        dangerous=True,
    )


async def _purge(form: Form, operator: Operator) -> str:
    removed = await operator.purge(_checked(form))
    return f"{removed} tasks were cancelled in {form.one('queue')}."


def _checked(form: Form) -> str:
    name = form.one("queue")
    if name not in _NAMES:
        raise NotPossibleError(f"No queue {name[:80]!r}.")
    return name


PAGES = [
    Page("/queues", "queues", "Queues", _all, section="Monitoring", per_vo=True),
    Page("/queues/{queue}", "queue", "Queue", _one, nav="/queues", per_vo=True),
]
ACTIONS = [Action("/queues/purge", _ask_purge, _purge, per_vo=True)]
