"""Locks and limiters: who holds them, who waits, and taking one away."""

from __future__ import annotations

from typing import Any

from .... import operations
from ....operations.views import LOCKS
from ..page import Action, AppContext, Form, NotFoundError, NotPossibleError, Operator, Page, Question, Request
from ..tables import Table, TablePage

_PAGE = 100


async def _all(request: Request, context: AppContext) -> dict[str, Any]:
    page = await operations.locks(context.redis, _PAGE, request.query_params.get("after"))
    caption = "Locks that tasks hold or wait for, and limiters that were used within the last day."
    table = Table(
        view=LOCKS, rows=page.items, caption=caption, after=page.after, empty="No lock is held or waited for."
    )
    return TablePage(table=table).values()


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
        raise NotPossibleError(f"Nobody holds {key[:200]!r} any more.")
    if found.kind == "rate":
        return Question(
            f"Give back the quota of {key}?",
            f"{found.held} units were spent within the window. Tasks that wait for it come at their time.",
            "Give it back",
        )
    chosen = form.many("owner")
    holders = [holder for holder in found.holders if not chosen or holder.owner in chosen]
    if not holders:
        raise NotPossibleError("It was given back meanwhile.")
    return Question(
        f"Take {key} away from {'its holder' if found.held == 1 else 'this holder' if chosen else 'its holders'}?",
        "Each task below is cancelled when its worker next renews the lock, and counts as failed. Until then it "
        "runs side by side with the next holder.",
        "Release it",
        [f"{holder.task_name or 'unknown task'} {holder.task_id or holder.owner}" for holder in holders],
        dangerous=True,
        fields={"owner": [holder.owner for holder in holders]},
    )


async def _release(form: Form, operator: Operator) -> str:
    # None named is none released: it may have other holders by now, which the question was not about.
    released = await operator.release_lock(form.one("key"), form.many("owner"))
    if not released.released:
        raise NotPossibleError("It was given back meanwhile: nothing was changed.")
    return (
        f"Released: {released.released}, from {', '.join(h.task_id or h.owner for h in released.hit) or 'nobody'}."
    )


PAGES = [
    Page("/locks", "locks", "Locks", _all, section="Steering", all_vos=True),
    Page("/locks/one", "lock", "Lock", _one, nav="/locks", all_vos=True),
]
ACTIONS = [Action("/locks/release", _ask_release, _release)]
