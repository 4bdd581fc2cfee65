"""The audit log: who did what, and when."""

from __future__ import annotations

from typing import Any

from ....operations.audit import read_audit
from ....operations.cursors import place_in_stream
from ..page import AppContext, Page, Request, viewer_of

_PAGE = 100


async def _load(request: Request, context: AppContext) -> dict[str, Any]:
    query = request.query_params
    before, vo = query.get("after"), viewer_of(request).chosen(query.get("vo") or None)
    entries = await read_audit(context.redis, _PAGE, place_in_stream(before) if before else None, vo=vo)
    return {
        "entries": entries,
        "after": entries[-1].id if len(entries) == _PAGE else None,
        "vo": vo,
        # Which logs there are: the administrators', and one of each VO.
        "vos": (await context.settings()).vos if viewer_of(request).sees(None) else (),
    }


PAGES = [Page("/audit", "audit", "Audit log", _load, section="Record")]
