"""Page of running tasks, and the action to cancel tasks in any state."""

from __future__ import annotations

from functools import partial
from typing import Any

from .... import operations
from ....operations import RunningTask
from ....operations.formats import number
from ....operations.views import RUNNING
from ..page import Action, AppContext, Form, NotPossibleError, Operator, Page, Question, Request, viewer_of
from ..tables import Button, Table, cancel_button

_PAGE = 100


async def _load(request: Request, context: AppContext) -> dict[str, Any]:
    read = partial(operations.running, context.redis, registry=context.registry)
    page = await viewer_of(request).page(read, _PAGE, request.query_params.get("after"))
    snapshot = await context.snapshot()
    total = sum(queue.running for queue in snapshot.queues)
    return Table(
        view=RUNNING,
        rows=page.items,
        caption=f"{number(total)} running tasks, longest first; workers report every 5 s.",
        after=page.after,
        actions=_actions,
    ).values()


def _actions(task: RunningTask) -> list[Button]:
    return [cancel_button(task.task_id, f"{task.task_name}, running at {task.worker.partition(':')[0]}")]


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


PAGES = [Page("/running", "running", "Running", _load, section="Monitoring", per_vo=True)]
ACTIONS = [Action("/tasks/cancel", _ask_cancel, _cancel, per_vo=True)]
