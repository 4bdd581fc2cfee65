"""Callback groups that have not called back."""

from __future__ import annotations

from typing import Any

from .... import operations as monitor
from ....plumbing.broker.groups import read_group
from ..page import AppContext, NotFoundError, Page, Request

_GROUPS = 200
_CHILDREN = 200


async def _all(request: Request, context: AppContext) -> dict[str, Any]:
    snapshot = await context.snapshot()
    return {"groups": await monitor.groups(context.redis, _GROUPS), "total": snapshot.groups}


async def _one(request: Request, context: AppContext) -> dict[str, Any]:
    name = request.path_params["group"]
    group = await read_group(context.redis, name)
    if group is None:
        raise NotFoundError(f"There is no group {name!r} (any more): it has called back, or there never was one.")
    return {
        "group": group,
        "pending": group.pending_children[:_CHILDREN],
        "failed": dict(list(group.failed_children.items())[:_CHILDREN]),
    }


PAGES = [
    Page("/groups", "groups", "Groups", _all, section="Steering", all_vos=True),
    Page("/groups/{group}", "group", "Group", _one, nav="/groups", all_vos=True),
]
