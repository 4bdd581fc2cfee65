"""Failed attempts, with their tracebacks."""

from __future__ import annotations

from typing import Any

from ... import monitor
from ..page import Installation, Page, Request

#: Each has a traceback.
_PAGE = 20


async def _load(request: Request, installation: Installation) -> dict[str, Any]:
    task = request.query_params.get("task") or None
    page = await monitor.failures(installation.redis, _PAGE, request.query_params.get("after"), task_name=task)
    return {"page": page, "task": task}


PAGES = [Page("/failures", "failures", "Failures", _load, section="Trouble")]
