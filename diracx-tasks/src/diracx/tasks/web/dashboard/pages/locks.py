"""Pages of locks and limiters, with an action to release them."""

from __future__ import annotations

from typing import Any

from .... import operations
from ....operations.views import LOCKS
from ..page import Action, AppContext, Form, NotFoundError, NotPossibleError, Operator, Page, Question, Request
from ..tables import Table

_PAGE = 100


async def _all(request: Request, context: AppContext) -> dict[str, Any]:
    page = await operations.locks(context.redis, _PAGE, request.query_params.get("after"))
    caption = "Locks that tasks hold or wait for, and limiters that were used within the last day."
    return Table(view=LOCKS, rows=page.items, caption=caption, after=page.after).values()


async def _one(request: Request, context: AppContext) -> dict[str, Any]:
    key = request.query_params.get("key", "")
    try:
        found = await operations.lock(context.redis, key)
    except ValueError as error:
        raise NotFoundError(str(error)) from error
    return {"lock": found, "parent": ("/locks", "Locks"), "heading": key}


async def _ask_release(form: Form, context: AppContext) -> Question:
    key = form.one("key")
    found = await operations.lock(context.redis, key)
    if found is None or not found.held:
        raise NotPossibleError(f"{key[:200]!r} is not held.")
    if found.is_quota:
        return Question(
            f"Reset the quota of {key}?",
            f"{found.held} units were used within the window. Waiting tasks start at their due time.",
            "Reset quota",
        )
    chosen = form.many("owner")
    holders = [holder for holder in found.holders if not chosen or holder.owner in chosen]
    if not holders:
        raise NotPossibleError("The lock was released meanwhile.")
    return Question(
        f"Release {key} of {'its holder' if found.held == 1 else 'this holder' if chosen else 'its holders'}?",
        "Each task below is cancelled at the next renewal of the lock and counts as failed. Until then it may run "
        "at the same time as the next holder.",
        "Release lock",
        [f"{holder.task_name or 'unknown task'} {holder.task_id or holder.owner}" for holder in holders],
        dangerous=True,
        fields={"owner": [holder.owner for holder in holders]},
    )


async def _release(form: Form, operator: Operator) -> str:
    # Only the confirmed owners: the lock may have other holders by now.
    released = await operator.release_lock(form.one("key"), form.many("owner"))
    if not released.released:
        raise NotPossibleError("The lock was released meanwhile: nothing was changed.")
    tasks = ", ".join(holder.task_id or holder.owner for holder in released.hit)
    return f"Released: {released.released}, from {tasks or 'no task'}."


PAGES = [
    Page("/locks", "locks", "Locks", _all, section="Control"),
    Page("/locks/one", "lock", "Lock", _one, nav="/locks"),
]
ACTIONS = [Action("/locks/release", _ask_release, _release, per_vo=True)]
