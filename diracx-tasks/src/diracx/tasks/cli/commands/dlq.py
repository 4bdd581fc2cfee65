"""`dlq`: inspect dead letters, submit them again, or discard them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ... import operations
from ...operations.audited_actions import AuditedActions
from ...operations.dead_letters import dead_letter_record, dead_letter_summaries, dead_letter_summary
from ...operations.views import DEAD_LETTERS, WAITING_DEAD_LETTERS
from ...plumbing.persistence.dead_letter import DeadLetterStatus
from ...plumbing.persistence.published import import_published
from ...plumbing.persistence.resubmission import ResubmitStatus, Resubmitter
from ...plumbing.task_names import AmbiguousTaskNameError
from ..errors import CliError, UsageProblem, one_line
from ..options import AfterOption, JsonOption, command_group
from ..options import LimitOption as PageOption
from ..output import confirm, echo, echo_json, print_json, show, show_fields
from ..runtime.configuration import tasks_config
from ..runtime.databases import required_task_db
from ..runtime.server import Server, ServerAndTasks
from .dlq_filters import Choice, Filters, LimitOption, StatusFilter

if TYPE_CHECKING:
    from ...plumbing.persistence import TaskDB
    from ...plumbing.persistence.db import DeadLetterFilter

    Letter = Mapping[str, Any]

#: Refusals that are shown one by one; the rest is a number.
_REFUSALS_SHOWN = 10
_Answer = TypeVar("_Answer")

app = command_group(
    "dlq",
    "Dead letters: tasks that failed for good, or that no worker could run. They are in the database "
    "DIRACX_DB_URL_TASKDB; `waiting` has those that wait for one. ID is a task id, or the number in the list.",
)

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Task id, or the number in the list.")]
StatusOption = Annotated[
    StatusFilter,
    typer.Option("--status", case_sensitive=False, help="Only with this status; open: pending or resubmitting."),
]


@app.command("list")
def list_letters(
    *,
    filters: Filters,
    status: StatusOption = StatusFilter.OPEN,
    limit: LimitOption = 100,
    as_json: JsonOption = False,
) -> None:
    """List dead letters, oldest first; the open ones unless another status is asked for.

    Example: diracx-task-run dlq list --reason exhausted --since 24h
    """
    where = filters.letters(status)

    async def read(db: TaskDB) -> tuple[list[dict[str, Any]], int]:
        counts = await db.count(**where)
        return [letter async for letter in dead_letter_summaries(db, where, limit)], sum(counts.values())

    letters, total = _in_database(read)
    if as_json:
        echo_json([dead_letter_summary(letter) for letter in letters], indent=2)
        return
    show(DEAD_LETTERS, letters, as_json)
    if 0 < len(letters) < total:
        echo(f"{len(letters)} of {total}; --limit shows more", err=True)


@app.command()
def waiting(
    *, limit: PageOption = 100, after: AfterOption = None, as_json: JsonOption = False, server: ServerAndTasks
) -> None:
    """List the dead letters that wait in Redis, oldest first: no worker with a database has stored them yet.

    They are moved into the database, and into `dlq list`, when a worker with DIRACX_DB_URL_TASKDB starts.

    Example: diracx-task-run dlq waiting --json
    """
    registry = server.registry
    page = server.query(lambda redis: operations.waiting_dead_letters(redis, limit, after, registry=registry))
    show(WAITING_DEAD_LETTERS, page, as_json)


@app.command("show")
def show_letter(*, letter_id: IdArgument, as_json: JsonOption = False) -> None:
    """Show one dead letter: its arguments, why it is here, and every attempt with its traceback.

    Example: diracx-task-run dlq show 17
    """
    shown = dead_letter_record(_in_database(lambda db: _find(db, letter_id)))
    if as_json:
        print_json(shown)
        return
    show_fields(_fields(shown))
    for number, failure in enumerate(shown["history"], 1):
        why = f"{failure['reason']}: {one_line(failure['detail'])}"
        echo(f"\nearlier failure {number}, {failure['buried_at']}: {why}")
        _print_attempts(failure["attempts"])
    if shown["history"]:
        echo("\nsince then")
    _print_attempts(shown["attempts"])


def _fields(shown: Letter) -> Iterator[tuple[str, str]]:
    yield "number", str(shown["id"])
    yield "task", shown["task_name"] or "-"
    yield "task id", shown["task_id"]
    yield "status", f"{shown['status'].lower()} since {shown['changed_at']}"
    yield "stored", f"{shown['buried_at']} from {shown['burial']}"
    yield "reason", shown["reason"]
    yield "detail", shown["detail"]
    if (message := shown["message"]) is None:
        yield "raw", shown["raw"]
        return
    yield "args", json.dumps(message["task_args"])
    yield "kwargs", json.dumps(message["task_kwargs"])
    if message["labels"]:
        yield "labels", json.dumps(message["labels"])


def _print_attempts(attempts: Sequence[Letter]) -> None:
    for number, attempt in enumerate(attempts, 1):
        where = f"{attempt.get('started', '?')} on {attempt.get('host', '?')}"
        failure = f"{attempt.get('type', '?')}: {attempt.get('message', '')}"
        echo("")
        echo(one_line(f"attempt {number}, {where}: {failure}"))
        for line in str(attempt.get("traceback", "")).splitlines():
            echo(f"  {line}")


@app.command()
def export(
    *,
    filters: Filters,
    status: StatusOption = StatusFilter.ANY,
    limit: LimitOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Changes nothing: it is JSON already.")] = False,
) -> None:
    """Write dead letters to stdout, one complete JSON object a line; `raw` is the message in base64.

    Example: diracx-task-run dlq export --since 2030-01-31 > letters.jsonl
    """
    where = filters.letters(status)

    async def write(db: TaskDB) -> None:
        async for summary in dead_letter_summaries(
            db, where, limit
        ):  # one body at a time: each may have megabytes
            if (letter := await db.find(summary["task_id"])) is not None:
                sys.stdout.write(json.dumps(dead_letter_record(letter)) + "\n")
        sys.stdout.flush()

    try:
        _in_database(write)
    except BrokenPipeError:  # as in `… | head`: the rest is not read
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.command()
def init() -> None:
    """Create the table of dead letters where it is missing. `diracx-task-run db` upgrades it to new versions.

    As `python -m diracx.db init-sql` does, which does not support PostgreSQL. Imports what diracx-tasks 0.7 has
    left in its table dlq_tasks of this database; its rows stay.

    Example: diracx-task-run dlq init
    """

    async def create() -> int:
        async with required_task_db(tables=False) as db:
            await db.migrations.create(db.engine)
            return await import_published(db)

    imported = asyncio.run(create())
    echo("the table DeadLetters is there")
    if imported:
        echo(f"{imported} dead letters of dlq_tasks, the table of diracx-tasks 0.7, are imported")


@app.command()
def retry(*, choice: Choice, as_json: JsonOption = False, server: ServerAndTasks) -> None:
    """Submit dead letters again, under their old task ids and with all their retries.

    Each is submitted once, however often this is repeated, also by several users at once. Exits with 1 when one
    of them could not be submitted.

    Example: diracx-task-run dlq retry --task my_tasks:Download --since 24h --yes
    """
    where = choice.letters(StatusFilter.OPEN)

    async def submit(db: TaskDB) -> list[Any]:
        chosen = [await _find(db, letter_id, summary=True) for letter_id in choice.ids]
        registry, config = server.registry, tasks_config()
        async with server.connected() as broker:
            resubmitter = Resubmitter(db, broker, registry, config)
            if not chosen:
                await _confirmed(db, where, choice, "Submit {} dead letters again?")
            actions = AuditedActions.at_command_line(broker.redis)
            return await actions.retry_dead_letters(resubmitter, chosen or None, where, choice.limit)

    results = _in_database(submit)
    done = {each: [result.dead_letter for result in results if result.status is each] for each in ResubmitStatus}
    resubmitted, already = done[ResubmitStatus.RESUBMITTED], done[ResubmitStatus.ALREADY]
    refused = [(result.dead_letter, result.why) for result in results if result.status is ResubmitStatus.REFUSED]
    if as_json:
        _print_report(resubmitted=resubmitted, already=already, refused=refused)
    elif not results:
        echo("no dead letters", err=True)
    elif len(refused) < len(results):
        echo(f"{len(resubmitted)} submitted again" + (f", {len(already)} had been already" if already else ""))
    _report_refusals(refused, "submitted again")


@app.command()
def discard(*, choice: Choice, as_json: JsonOption = False, server: Server) -> None:
    """Mark dead letters as discarded: they will not run again. Their rows stay.

    The server is needed for the audit log. Exits with 1 when one of them could not be discarded.

    Example: diracx-task-run dlq discard --reason unparsable --yes
    """
    where = choice.letters(StatusFilter.PENDING)

    async def decide(db: TaskDB) -> tuple[Sequence[Letter], set[int]]:
        chosen = [await _find(db, letter_id, summary=True) for letter_id in choice.ids]
        if not chosen:
            await _confirmed(db, where, choice, "Discard {} dead letters?")
            chosen = [letter async for letter in dead_letter_summaries(db, where, choice.limit)]
        if not chosen:
            return [], set()
        async with server.connected() as broker:
            actions = AuditedActions.at_command_line(broker.redis)
            return chosen, await actions.discard_dead_letters(db, chosen, None if choice.ids else where)

    chosen, done = _in_database(decide)
    discarded = [letter for letter in chosen if letter["id"] in done]
    refused = [(letter, _why_not_discarded(letter)) for letter in chosen if letter["id"] not in done]
    if as_json:
        _print_report(discarded=discarded, refused=refused)
    elif discarded:
        echo(f"{len(discarded)} discarded")
    elif not refused:
        echo("no dead letters", err=True)
    _report_refusals(refused, "discarded")


def _why_not_discarded(letter: Letter) -> str:
    match letter["status"]:
        case DeadLetterStatus.RESUBMITTED:
            return "it was submitted again, and is no longer here to be discarded"
        case DeadLetterStatus.RESUBMITTING:
            return "its re-submission has begun; finish that with `diracx-task-run dlq retry`"
    return "its status has changed meanwhile; list it again"


def _print_report(*, refused: Sequence[tuple[Letter, str]], **done: Sequence[Letter]) -> None:
    def ids(letter: Letter) -> dict[str, Any]:
        return {"id": letter["id"], "task_id": letter["task_id"]}

    report = {name: [ids(letter) for letter in letters] for name, letters in done.items()}
    print_json(report | {"refused": [ids(letter) | {"why": why} for letter, why in refused]}, indent=None)


def _report_refusals(refused: Sequence[tuple[Letter, str]], what: str) -> None:
    """Raise a CliError where dead letters were refused; reasons are in it, or printed before."""
    if not refused:
        return
    if len(refused) == 1:
        [(letter, why)] = refused
        raise CliError(f"dead letter {letter['id']} ({letter['task_id']}) was not {what}: {why}")
    for letter, why in refused[:_REFUSALS_SHOWN]:
        echo(one_line(f"dead letter {letter['id']} ({letter['task_id']}): {why}"), err=True)
    raise CliError(f"{len(refused)} dead letters were not {what}")


def _in_database(use: Callable[[TaskDB], Awaitable[_Answer]]) -> _Answer:

    async def run() -> _Answer:
        async with required_task_db() as db:
            try:
                return await use(db)
            except AmbiguousTaskNameError as error:
                raise UsageProblem(str(error)) from error

    return asyncio.run(run())


async def _find(db: TaskDB, letter_id: str, *, summary: bool = False) -> dict[str, Any]:
    letter = await (db.find_summary if summary else db.find)(letter_id)
    if letter is None:
        raise CliError(f"there is no dead letter {letter_id!r}; `diracx-task-run dlq list --status any` has all")
    return letter


async def _confirmed(db: TaskDB, where: DeadLetterFilter, choice: Choice, question: str) -> None:
    """Ask before something is done to all dead letters of a filter; errors as of `confirm`."""
    total = sum((await db.count(**where)).values())
    total = total if choice.limit is None else min(total, choice.limit)
    if total:
        await asyncio.to_thread(confirm, question.format(total), choice.yes)
