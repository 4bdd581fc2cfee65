"""Pages of pending callback groups."""

from __future__ import annotations

from typing import Any

from .... import operations
from ....operations.formats import number
from ....operations.views import GROUPS
from ....plumbing.broker.groups import read_group
from ..page import AppContext, NotFoundError, Page, Request
from ..tables import Table

_GROUPS = 200
_CHILDREN = 200


async def _all(request: Request, context: AppContext) -> dict[str, Any]:
    snapshot = await context.snapshot()
    groups = await operations.groups(context.redis, _GROUPS)
    caption = "Pending groups."
    if snapshot.groups > len(groups):
        caption = f"{len(groups)} of {number(snapshot.groups)} pending groups, those that expire first."
    return Table(view=GROUPS, rows=groups, caption=caption).values()


async def _one(request: Request, context: AppContext) -> dict[str, Any]:
    name = request.path_params["group"]
    group = await read_group(context.redis, name)
    if group is None:
        raise NotFoundError(f"No group {name!r}: its callback was submitted, it has expired, or it never existed.")
    return {
        "group": group,
        "parent": ("/groups", "Groups"),
        "heading": name,
        "pending": group.pending_children[:_CHILDREN],
        "failed": dict(list(group.failed_children.items())[:_CHILDREN]),
    }


PAGES = [
    Page("/groups", "groups", "Groups", _all, section="Control"),
    Page("/groups/{group}", "group", "Group", _one, nav="/groups"),
]
