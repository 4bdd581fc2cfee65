"""Page of failed attempts, with their tracebacks."""

from __future__ import annotations

from functools import partial
from typing import Any

from .... import operations
from ..page import AppContext, Page, Request, viewer_of

_PAGE = 20


async def _load(request: Request, context: AppContext) -> dict[str, Any]:
    task = request.query_params.get("task") or None
    read = partial(operations.failures, context.redis, task_name=task)
    page = await viewer_of(request).page(read, _PAGE, request.query_params.get("after"))
    return {"page": page, "task": task}


PAGES = [Page("/failures", "failures", "Failures", _load, section="Problems", per_vo=True)]
