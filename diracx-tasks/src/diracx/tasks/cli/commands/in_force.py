"""`config in-force`: which process runs with which configuration."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import typer

from ..errors import explained_redis, mask
from ..options import JsonOption, RedisUrlFileOption, RedisUrlOption, resolve_redis_url
from ..output import console, echo_json, show_table, styled, table

if TYPE_CHECKING:
    from ...plumbing.config.active import InForce


def in_force(
    as_json: JsonOption = False,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """Show with which configuration each worker and scheduler runs, since when, and what is wrong with it.

    Processes with the same settings show the same digest. Where something is wrong with what is written, the
    last good configuration is in force; exits with 1 then.

    Example: diracx-task-run config in-force --json
    """
    entries = asyncio.run(_ask(resolve_redis_url(redis_url, redis_url_file)))
    if as_json:
        echo_json([_masked(entry.as_dict()) for entry in entries], indent=2)
    else:
        print_in_force(entries)
    if any(entry.problems for entry in entries):
        raise typer.Exit(1)


async def _ask(url: str) -> list[InForce]:
    from ...plumbing.config.active import configurations_in_force
    from ..runtime.broker import open_broker

    async with open_broker(url) as broker:
        with explained_redis(url):
            return await configurations_in_force(broker.redis)


def print_in_force(entries: Sequence[InForce]) -> None:
    """A table of the processes, and below it each problem once, with the processes that have it."""
    rows = []
    for entry in entries:
        state = styled("in force", "green")
        if entry.problems:
            state = styled(f"last good one, {_age(entry.problems_since)}", "red")
        elif entry.warnings:
            state = styled("in force, with warnings", "yellow")
        vos = "-" if entry.vos is None else ", ".join(entry.vos) or "none"
        since = datetime.fromtimestamp(entry.since, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        rows.append((entry.process, entry.role, entry.digest, since, state, entry.source, vos))
    columns = ("process", "role", "configuration", "since", "state", "from", "VOs")
    show_table(table(columns, rows, unbroken=columns[1:4]), "no worker or scheduler runs")
    for kind, style in (("problems", "red"), ("warnings", "yellow")):
        lines: dict[str, list[str]] = {}
        for entry in entries:
            for line in getattr(entry, kind):
                lines.setdefault(line, []).append(entry.process)
        for line, processes in lines.items():
            where = processes[0] if len(processes) == 1 else f"{len(processes)} processes"
            console().print(styled(f"{line} ({where})", style), soft_wrap=True)


def _age(moment: float | None) -> str:
    seconds = max(0.0, time.time() - (moment or time.time()))
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"for {seconds / length:.0f} {unit}"
    return f"for {seconds:.0f} s"


def _masked(entry: dict[str, object]) -> dict[str, object]:
    return {
        name: [mask(line) for line in value] if name in ("problems", "warnings") else value  # type: ignore[attr-defined]  # lists of lines
        for name, value in entry.items()
    }
