"""`group`: inspect callback groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import typer

from ...operations import groups
from ...operations.views import GROUPS
from ...plumbing.broker.groups import GroupStatus, read_group
from ..errors import CliError
from ..options import JsonOption, command_group
from ..output import field_lines, print_json, report, show
from ..runtime.server import Server

#: Maximum number of listed children.
_NAMED_CHILDREN = 10

app = command_group("group", "Inspect pending callback groups.")


@app.command("show")
def show_group(
    *,
    group_id: Annotated[str, typer.Argument(metavar="ID", help="Group id, as `spawn_with_callback` returns it.")],
    as_json: JsonOption = False,
    server: Server,
) -> None:
    """Show one group: state, callback, counts of its children, and which are pending or failed.

    A group is removed when its callback is submitted; exits with 1 then.

    Example: diracx-task-run group show 0f3c6dd2a7b84c0e9a3c5b1d8e7f6a90
    """
    status = server.query(lambda redis: read_group(redis, group_id))
    if status is None:
        raise CliError(
            f"no group {group_id!r}: its callback was submitted, it has expired, or it never existed; "
            "see `diracx-task-run group list`"
        )
    report(status, field_lines(_fields(status)), as_json, indent=2)


@app.command("list")
def list_(*, as_json: JsonOption = False, server: Server) -> None:
    """List the pending callback groups, oldest first.

    Example: diracx-task-run group list --json
    """
    found = server.query(groups)
    if as_json:
        children = ("pending_children", "failed_children")  # `group show` has them
        print_json([{k: v for k, v in asdict(status).items() if k not in children} for status in found])
    else:
        show(GROUPS, found, as_json)


def _fields(status: GroupStatus) -> Iterator[tuple[str, str]]:
    counts = f"{status.succeeded} succeeded, {status.failed} failed, {status.pending} pending"
    yield "group", status.group_id
    yield "state", str(status.state)
    yield "children", f"{status.total}: {counts}"
    yield "callback", status.callback
    yield "on failure", status.on_failure or "-"
    yield "created", status.created.isoformat(timespec="seconds")
    yield "expires", status.expires.isoformat(timespec="seconds")
    yield from _children("failed", [f"{child}  {error}" for child, error in status.failed_children.items()])
    yield from _children("pending", status.pending_children)


def _children(state: str, lines: list[str]) -> Iterator[tuple[str, str]]:
    for line in lines[:_NAMED_CHILDREN]:
        yield state, line
    if len(lines) > _NAMED_CHILDREN:
        yield state, f"and {len(lines) - _NAMED_CHILDREN} more; all of them with --json"
