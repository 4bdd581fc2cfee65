"""What runs at the moment; and the cancelling of tasks, wherever they are."""

from __future__ import annotations

from functools import partial
from typing import Any

from .... import operations as monitor
from ..page import Action, AppContext, Form, NotPossibleError, Operator, Page, Question, Request, viewer_of

_PAGE = 100


async def _load(request: Request, context: AppContext) -> dict[str, Any]:
    look = partial(monitor.running, context.redis, registry=context.registry)
    page = await viewer_of(request).page(look, _PAGE, request.query_params.get("after"))
    snapshot = await context.snapshot()
    return {"page": page, "total": sum(queue.running for queue in snapshot.queues)}


async def _ask_cancel(form: Form, context: AppContext) -> Question:
    ids, about = _ids(form), form.one("about")
    return Question(
        "Cancel this task?" if len(ids) == 1 else f"Cancel {len(ids)} tasks?",
        "What has not begun is gone at once; what runs is cancelled by its worker within about a second. "
        "It is not retried, and is no dead letter.",
        "Cancel it" if len(ids) == 1 else "Cancel them",
        details=[f"{ids[0]}: {about}"] if len(ids) == 1 and about else ids,
        dangerous=True,
    )


async def _cancel(form: Form, operator: Operator) -> str:
    found = await operator.cancel_tasks(_ids(form))
    gone = [task for task, place in found.items() if place == "unknown"]
    told = ", ".join(f"{task} ({place})" for task, place in list(found.items())[:5] if place != "unknown")
    if not told:
        raise NotPossibleError("Nothing was cancelled: it had ended already.")
    return f"Cancelled: {told}" + (f"; {len(gone)} had ended already." if gone else ".")


def _ids(form: Form) -> list[str]:
    ids = [text.strip() for text in form.many("task") if text.strip()]
    if not ids:
        raise NotPossibleError("No task was chosen.")
    return ids


PAGES = [Page("/running", "running", "Running", _load, section="Now")]
ACTIONS = [Action("/tasks/cancel", _ask_cancel, _cancel)]
