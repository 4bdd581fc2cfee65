"""`audit`: who did what, and when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..options import JsonOption, RedisUrlFileOption, RedisUrlOption
from .inspect import AfterOption, LimitOption, ask, print_json

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from ...operations.audit import AuditEntry
    from ...operations.models import Page


def audit(
    limit: LimitOption = 50,
    after: AfterOption = None,
    vo: Annotated[
        str | None,
        typer.Option("--vo", metavar="VO", help="What members of this VO did by HTTP, instead of administrators."),
    ] = None,
    as_json: JsonOption = False,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """List who did what, newest first: by command line, dashboard and HTTP, to tasks and to compute elements.

    Somebody at a command line is user@host. About the last 10,000 actions of administrators are kept, and as many
    of the members of each VO.

    Example: diracx-task-run audit --limit 10
    """
    from .monitor_view import print_audit

    async def look(redis: Redis) -> Page[AuditEntry]:
        from ...operations.audit import read_audit
        from ...operations.cursors import place_in_stream
        from ...operations.models import Page

        # One more tells whether there are more.
        found = await read_audit(redis, limit + 1, None if after is None else place_in_stream(after), vo=vo)
        return Page(items=found[:limit], after=found[limit - 1].id if len(found) > limit else None)

    page = ask(redis_url, redis_url_file, look)
    if as_json:
        print_json(page)
    else:
        print_audit(page)
