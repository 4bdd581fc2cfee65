"""Pages of queues, and of queued, running and delayed tasks, with actions to cancel tasks in any state."""

from __future__ import annotations

from functools import partial
from typing import Any

from .... import operations
from ....operations import DelayedTask, QueuedTask, RunningTask
from ....operations.cursors import queue_of
from ....operations.formats import duration, number
from ....operations.queued import DELAYED_SEARCHED
from ....operations.views import DELAYED, QUEUED, QUEUES, RUNNING
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
from ..tables import Button, Fact, Link, Table

_PAGE = 50
_RUNNING_PAGE = 100
_NAMES = [queue_of(name) for name in ALL_STREAM_NAMES]
_REASONS = {"at_time": "Until a time", "retry": "For a retry", "lock": "For a lock", "rate": "For quota"}


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

    def cancel(task: QueuedTask) -> list[Button]:
        return [_cancel_button(task.task_id, f"{task.task_name}, waiting in {name}")] if task.task_id else []

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
        actions=cancel,
        buttons=[purge] if page.items else [],
    ).values(parent=("/queues", "Queues"), heading=name)


async def _running(request: Request, context: AppContext) -> dict[str, Any]:
    read = partial(operations.running, context.redis, registry=context.registry)
    page = await viewer_of(request).page(read, _RUNNING_PAGE, request.query_params.get("after"))
    total = sum(queue.running for queue in (await context.snapshot()).queues)

    def cancel(task: RunningTask) -> list[Button]:
        return [_cancel_button(task.task_id, f"{task.task_name}, running at {task.worker.partition(':')[0]}")]

    return Table(
        view=RUNNING,
        rows=page.items,
        caption=f"{number(total)} running, longest first; workers report every 5 s.",
        after=page.after,
        actions=cancel,
    ).values()


async def _delayed(request: Request, context: AppContext) -> dict[str, Any]:
    reason: Any = request.query_params.get("reason") or None  # checked by `delayed`
    viewer = viewer_of(request)
    at_most = viewer.share(DELAYED_SEARCHED)
    read = partial(operations.delayed, context.redis, reason, registry=context.registry, at_most=at_most)
    page = await viewer.page(read, _PAGE, request.query_params.get("after"))
    snapshot = await context.snapshot()
    links = [Link("All", "/delayed", reason is None, sum(snapshot.delayed.values()))]
    links += [
        Link(text, f"/delayed?reason={name}", reason == name, snapshot.delayed.get(name, 0))
        for name, text in _REASONS.items()
    ]
    overdue = f"{number(snapshot.overdue)} of them are overdue: no worker or scheduler promotes them."

    def cancel(task: DelayedTask) -> list[Button]:
        return [_cancel_button(task.task_id, f"{task.task_name}, delayed ({task.reason}) for {task.queue}")]

    return Table(
        filters=links,
        filters_label="Reason",
        notes=[overdue] if snapshot.overdue else [],
        view=DELAYED,
        rows=page.items,
        caption="By due time; tasks that wait for a lock may start earlier, when it is released.",
        after=page.after,
        actions=cancel,
    ).values()


# --- actions ------------------------------------------------------------------------------------------------


def _cancel_button(task_id: str, about: str) -> Button:
    return Button("/tasks/cancel", "Cancel", {"task": task_id, "about": about}, f"cancel-{task_id}")


async def _ask_cancel(form: Form, context: AppContext) -> Question:
    ids, about = _ids(form), form.one("about")
    return Question(
        "Cancel this task?" if len(ids) == 1 else f"Cancel {len(ids)} tasks?",
        "Waiting tasks are removed immediately; running tasks are cancelled by their workers within about a "
        "second. They are not retried and do not become dead letters.",
        "Cancel it" if len(ids) == 1 else "Cancel them",
        details=[f"{ids[0]}: {about}"] if len(ids) == 1 and about else ids,
        dangerous=True,
    )


async def _cancel(form: Form, operator: Operator) -> str:
    found = await operator.cancel_tasks(_ids(form))
    ended = [task for task, place in found.items() if place == "unknown"]
    cancelled = ", ".join(f"{task} ({place})" for task, place in list(found.items())[:5] if place != "unknown")
    if not cancelled:
        raise NotPossibleError("Nothing was cancelled: it had ended already.")
    return f"Cancelled: {cancelled}" + (f"; {len(ended)} had ended already." if ended else ".")


def _ids(form: Form) -> list[str]:
    ids = [text.strip() for text in form.many("task") if text.strip()]
    if not ids:
        raise NotPossibleError("No task is selected.")
    return ids


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
    Page("/running", "running", "Running", _running, section="Monitoring", per_vo=True),
    Page("/delayed", "delayed", "Delayed", _delayed, section="Monitoring", per_vo=True),
]
ACTIONS = [
    Action("/queues/purge", _ask_purge, _purge, per_vo=True),
    Action("/tasks/cancel", _ask_cancel, _cancel, per_vo=True),
]
