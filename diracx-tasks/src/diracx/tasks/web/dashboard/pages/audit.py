"""Page of the audit log."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from ....operations.audit import audit_page
from ....operations.views import AUDIT
from ..page import AppContext, Page, Request, viewer_of
from ..tables import Link, Table

_PAGE = 100


async def _load(request: Request, context: AppContext) -> dict[str, Any]:
    query, viewer = request.query_params, viewer_of(request)
    vo = viewer.chosen(query.get("vo") or None)
    page = await audit_page(context.redis, _PAGE, query.get("after") or None, vo=vo)
    # One log of administrators, and one per VO.
    vos = list((await context.settings()).vos) if viewer.sees(None) else [vo] if vo else []
    administrators = [Link("administrators", "/audit", vo is None)] if viewer.sees(None) and vos else []
    actions = (
        f"Actions of members of {vo} by HTTP"
        if vo
        else "Actions of administrators by dashboard, HTTP or command line"
    )
    return Table(
        filters=administrators + [Link(name, f"/audit?vo={quote(name, safe='')}", name == vo) for name in vos],
        filters_label="Logs",
        view=AUDIT,
        rows=page.items,
        caption=f"{actions}, newest first.",
        after=page.after,
    ).values()


PAGES = [Page("/audit", "audit", "Audit log", _load, section="History", per_vo=True)]
