"""`group`: look at callback groups."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..errors import CliError, explained_redis, mask, one_line
from ..options import JsonOption, RedisUrlFileOption, RedisUrlOption, resolve_redis_url
from ..output import echo, echo_json, show_table, table

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from ...plumbing.broker.groups import GroupStatus

_Answer = TypeVar("_Answer")

#: Children that are named; of more, there is a count.
_SHOWN = 10

group = typer.Typer(help="Look at callback groups that have not called back.")


@group.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@group.command("show")
def show(
    group_id: Annotated[str, typer.Argument(metavar="ID", help="Group id, as `spawn_with_callback` gives it.")],
    as_json: JsonOption = False,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """Show one group: its state, its callback, how many children have ended, and which have failed and why.

    A group that has called back is gone; exits with 1 then.

    Example: diracx-task-run group show 0f3c6dd2a7b84c0e9a3c5b1d8e7f6a90
    """
    from ...plumbing.broker.groups import read_group

    status = _ask(resolve_redis_url(redis_url, redis_url_file), lambda redis: read_group(redis, group_id))
    if status is None:
        raise CliError(
            f"no group {group_id!r}: it has called back, has expired, or never was; "
            "see `diracx-task-run group list`"
        )
    if as_json:
        echo_json(_as_json(status, children=True), indent=2)
    else:
        _print(status)


@group.command("list")
def list_(
    as_json: JsonOption = False,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """List the groups that have not called back, oldest first.

    Example: diracx-task-run group list --json
    """
    from ...plumbing.broker.groups import list_groups

    groups = _ask(resolve_redis_url(redis_url, redis_url_file), list_groups)
    if as_json:
        echo_json([_as_json(status, children=False) for status in groups], indent=2)
    else:
        _print_table(groups)


def _ask(url: str, question: Callable[[Redis], Awaitable[_Answer]]) -> _Answer:
    from ..runtime.broker import open_broker

    async def ask() -> _Answer:
        async with open_broker(url) as broker:
            with explained_redis(url):
                return await question(broker.redis)

    return asyncio.run(ask())


def _as_json(status: GroupStatus, *, children: bool) -> dict[str, Any]:
    from dataclasses import asdict

    report = asdict(status)
    report |= {name: report[name].isoformat() for name in ("created", "expires")}
    report["failed_children"] = {child: mask(error) for child, error in status.failed_children.items()}
    if not children:
        del report["pending_children"], report["failed_children"]
    return report


def _print(status: GroupStatus) -> None:
    lines = [
        ("group", status.group_id),
        ("state", str(status.state)),
        ("children", f"{status.total}: {_counts(status)}"),
        ("callback", status.callback),
        ("on failure", status.on_failure or "-"),
        ("created", status.created.isoformat(timespec="seconds")),
        ("expires", status.expires.isoformat(timespec="seconds")),
    ]
    for label, value in lines:
        echo(f"{label:<11} {one_line(value)}")
    _print_children("failed", [f"{child}  {error}" for child, error in status.failed_children.items()])
    _print_children("pending", status.pending_children)


def _print_children(label: str, lines: list[str]) -> None:
    for line in lines[:_SHOWN]:
        echo(f"{label:<11} {one_line(line)}")
    if len(lines) > _SHOWN:
        echo(f"{label:<11} and {len(lines) - _SHOWN} more; all of them with --json")


def _counts(status: GroupStatus) -> str:
    return f"{status.succeeded} succeeded, {status.failed} failed, {status.pending} pending"


def _print_table(groups: list[GroupStatus]) -> None:
    rows = [
        (
            status.group_id,
            str(status.state),
            str(status.total),
            str(status.succeeded),
            str(status.failed),
            str(status.pending),
            status.callback,
            status.created.isoformat(timespec="seconds"),
        )
        for status in groups
    ]
    columns = ("group", "state", "total", "succeeded", "failed", "pending", "callback", "created")
    show_table(table(columns, rows), "no callback groups")
