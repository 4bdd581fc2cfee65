"""The audit log: who did what, and when."""

from __future__ import annotations

import re
from typing import Any

from ..audit import read_audit
from ..page import Installation, NotFoundError, Page, Request

_PAGE = 100
_ID = re.compile(r"\d{1,20}-\d{1,20}")


async def _load(request: Request, installation: Installation) -> dict[str, Any]:
    before = request.query_params.get("after")
    if before and not _ID.fullmatch(before):
        raise NotFoundError(f"{before[:40]!r} is no place in the audit log.")
    entries = await read_audit(installation.redis, _PAGE, before)
    return {"entries": entries, "after": entries[-1].id if len(entries) == _PAGE else None}


PAGES = [Page("/audit", "audit", "Audit log", _load, section="Record")]
