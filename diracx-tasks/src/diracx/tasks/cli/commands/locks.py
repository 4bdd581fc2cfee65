"""`locks`: who holds a lock, who waits for it; take it away."""

from __future__ import annotations

from typing import Annotated

import typer

from ..confirm import confirm
from ..errors import CliError, one_line
from ..options import JsonOption, RedisUrlFileOption, RedisUrlOption
from ..output import echo
from .inspect import AfterOption, LimitOption, ask, print_json

app = typer.Typer(help="Look at locks and limiters; take a lock away.", no_args_is_help=True)

KeyArgument = Annotated[
    str, typer.Argument(metavar="KEY", help="Redis key of the lock, as lock:mutex:job:42; `locks list` has them.")
]


@app.command("list")
def list_(
    limit: LimitOption = 100,
    after: AfterOption = None,
    as_json: JsonOption = False,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """List the locks that tasks hold or wait for, and the limiters that were used within the last day.

    A lock that is held outside the task system is listed while a task waits for it; `locks show` finds it by name.

    Example: diracx-task-run locks list --json
    """
    from ... import operations as monitor
    from .monitor_view import print_locks

    page = ask(redis_url, redis_url_file, lambda redis: monitor.locks(redis, limit, after))
    if as_json:
        print_json(page)
    else:
        print_locks(page)


@app.command("show")
def show(
    key: KeyArgument,
    as_json: JsonOption = False,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """Show one lock: who holds it, until when, how many wait, and what is left of a limiter's quota.

    Exits with 1 when nobody holds it or waits for it.

    Example: diracx-task-run locks show lock:mutex:task:CleanSandboxStoreTask
    """
    from ... import operations as monitor
    from .monitor_view import print_lock

    found = ask(redis_url, redis_url_file, lambda redis: monitor.lock(redis, key))
    if found is None:
        raise CliError(f"nobody holds {key} or waits for it")
    if as_json:
        print_json(found)
    else:
        print_lock(found)


@app.command("release")
def release(
    key: KeyArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """Take a lock away from whoever holds it; who waits for it comes next. Says which task is hit, and asks first.

    A task that loses its lock is cancelled within a third of a lease (10 s) and counts as failed. Until then it
    may run side by side with the next one. Of a rate limiter, the spent quota comes back.

    Example: diracx-task-run locks release lock:mutex:job:42
    """
    from ... import operations as monitor
    from ...operations.audited_actions import Deeds
    from .monitor_view import hit

    found = ask(redis_url, redis_url_file, lambda redis: monitor.lock(redis, key))
    if found is None or not found.held:
        raise CliError(f"nobody holds {key}")
    if found.kind == "rate":
        question = f"Give back {found.held} units of quota of {key}?"
    else:
        for line in map(hit, found.holders):
            echo(one_line(line), err=True)
        question = f"Take {key} away from {'it' if found.held == 1 else f'these {len(found.holders)}'}?"
    confirm(question, yes)
    owners = None if found.kind == "rate" else [holder.owner for holder in found.holders]
    done = ask(redis_url, redis_url_file, lambda redis: Deeds.at_command_line(redis).release_lock(key, owners))
    if as_json:
        print_json(done)
    elif not done.released:
        raise CliError(f"{key} was given back meanwhile: nothing was changed")
    else:
        echo(f"{done.released} {'units of quota' if found.kind == 'rate' else 'released'}")
