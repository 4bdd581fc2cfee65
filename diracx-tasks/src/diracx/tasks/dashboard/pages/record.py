"""The audit log: who did what, and when."""

from __future__ import annotations

from typing import Any

from ...monitor.audit import read_audit
from ...monitor.places import place_in_stream
from ..page import Installation, Page, Request

_PAGE = 100


async def _load(request: Request, installation: Installation) -> dict[str, Any]:
    before = request.query_params.get("after")
    entries = await read_audit(installation.redis, _PAGE, place_in_stream(before) if before else None)
    return {"entries": entries, "after": entries[-1].id if len(entries) == _PAGE else None}


PAGES = [Page("/audit", "audit", "Audit log", _load, section="Record")]
