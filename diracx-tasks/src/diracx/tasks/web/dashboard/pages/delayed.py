"""Delayed tasks: until a time, for a retry, for a lock, for quota."""

from __future__ import annotations

from functools import partial
from typing import Any

from .... import operations as monitor
from ....operations import DELAY_REASONS
from ..page import AppContext, NotFoundError, Page, Request, viewer_of

_PAGE = 50


async def _load(request: Request, context: AppContext) -> dict[str, Any]:
    reason = request.query_params.get("reason") or None
    if reason is not None and reason not in DELAY_REASONS:
        raise NotFoundError(f"Tasks are not delayed for {reason[:40]!r}.")
    look = partial(monitor.delayed, context.redis, reason, registry=context.registry)
    page = await viewer_of(request).page(look, _PAGE, request.query_params.get("after"))
    snapshot = await context.snapshot()
    return {"page": page, "counts": snapshot.delayed, "reason": reason, "overdue": snapshot.overdue}


PAGES = [Page("/delayed", "delayed", "Delayed", _load, section="Now")]
