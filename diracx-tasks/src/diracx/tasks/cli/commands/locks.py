"""`locks`: inspect locks and limiters; release a lock."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from ... import operations
from ...operations import Holder, Lock
from ...operations.audited_actions import AuditedActions
from ...operations.formats import remaining
from ...operations.views import LOCKS, holder, quota
from ..errors import CliError, one_line
from ..options import AfterOption, JsonOption, LimitOption, YesOption, command_group
from ..output import confirm, echo, field_lines, report, show
from ..runtime.server import Server

app = command_group("locks", "Inspect locks and limiters; release a lock.")

KeyArgument = Annotated[
    str, typer.Argument(metavar="KEY", help="Redis key of the lock, as lock:mutex:job:42; see `locks list`.")
]


@app.command("list")
def list_(
    *, limit: LimitOption = 100, after: AfterOption = None, as_json: JsonOption = False, server: Server
) -> None:
    """List the locks that tasks hold or wait for, and the limiters that were used within the last day.

    A lock that is held outside the task system is listed while a task waits for it; `locks show` finds it by key.

    Example: diracx-task-run locks list --json
    """
    show(LOCKS, server.query(lambda redis: operations.locks(redis, limit, after)), as_json)


@app.command("show")
def show_lock(*, key: KeyArgument, as_json: JsonOption = False, server: Server) -> None:
    """Show one lock: holders, expiry, number of waiting tasks, used quota of a limiter.

    Exits with 1 if the lock has neither holders nor waiting tasks.

    Example: diracx-task-run locks show lock:mutex:task:CleanSandboxStoreTask
    """
    found = server.query(lambda redis: operations.lock(redis, key))
    if found is None:
        raise CliError(f"{key} has neither holders nor waiting tasks; see `diracx-task-run locks list`")
    report(found, field_lines(_fields(found)), as_json, indent=2)


def _fields(lock: Lock) -> Iterator[tuple[str, str]]:
    yield "lock", lock.key
    yield "kind", lock.kind
    yield "held", quota(lock)
    yield "waiting", str(lock.waiters)
    if lock.held:
        yield "expires", remaining(lock.expires) + ("" if lock.is_quota else ", unless renewed")
    for each in lock.holders:
        until = "" if each.until is None else f", until {remaining(each.until)}"
        yield "held by", holder(each) + ("" if each.worker is None else f" on {each.worker}") + until


@app.command("release")
def release(*, key: KeyArgument, yes: YesOption = False, as_json: JsonOption = False, server: Server) -> None:
    """Take a lock from its holders and grant it to the next waiting task. Lists the holders and prompts first.

    The holder is cancelled within a third of a lease (10 s) and counts as failed. Until then it may run at the
    same time as the next one. Of a rate limiter, the used quota is reset.

    Example: diracx-task-run locks release lock:mutex:job:42
    """
    found = server.query(lambda redis: operations.lock(redis, key))
    if found is None or not found.held:
        raise CliError(f"{key} is not held")
    if found.is_quota:
        question = f"Reset the used quota of {key} ({quota(found)})?"
    else:
        for holder in found.holders:
            echo(one_line(_consequence(holder)), err=True)
        question = f"Release {key} of {'this holder' if found.held == 1 else f'these {len(found.holders)}'}?"
    confirm(question, yes)
    owners = None if found.is_quota else [holder.owner for holder in found.holders]
    done = server.query(lambda redis: AuditedActions.for_command_line(redis).release_lock(key, owners))
    if not done.released and not as_json:
        raise CliError(f"{key} was released meanwhile: nothing was changed")
    report(done, [f"{done.released} {'of quota reset' if found.is_quota else 'released'}"], as_json, indent=2)


def _consequence(holder: Holder) -> str:
    """Describe the effect of a release on a holder."""
    if holder.worker is None:
        return "held outside the task system: the holder will not be notified"
    if holder.task_id is None:
        return f"held by a task of worker {holder.worker}, which has not reported it yet: it will be cancelled"
    return f"held by {holder.task_name} {holder.task_id} on {holder.worker}: it will be cancelled"
