"""`dlq`: inspect dead letters, submit them again, or discard them."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from ... import operations
from ...operations.audited_actions import AuditedActions
from ...operations.dead_letters import (
    STATUSES,
    Decided,
    dead_letter_record,
    dead_letter_summaries,
    dead_letter_summary,
)
from ...operations.views import DEAD_LETTERS, WAITING_DEAD_LETTERS
from ...plumbing.persistence.dead_letter import DeadLetterReason
from ...plumbing.persistence.resubmission import Resubmitter
from ..errors import CliError, UsageProblem, one_line, shortened
from ..options import JsonOption, TaskOption, YesOption, command_group
from ..options import LimitOption as PageOption
from ..output import confirm, echo, echo_json, echo_traceback, field_lines, print_json, report, show
from ..runtime.configuration import tasks_config
from ..runtime.databases import NO_TASK_DB, open_database
from ..runtime.server import Listing, Server, ServerAndTasks

if TYPE_CHECKING:
    from ...plumbing.broker import RedisStreamBroker
    from ...plumbing.persistence import TaskDB
    from ...plumbing.persistence.db import DeadLetterFilter

    DeadLetter = Mapping[str, Any]
    DeadLetters = Sequence[DeadLetter]
    SelectedBy = DeadLetterFilter | None

_AGE = re.compile(r"(\d{1,9})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


Status = Literal["open", "pending", "resubmitting", "resubmitted", "discarded", "any"]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Maximum number of dead letters.")]


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Options that filter dead letters."""

    task: TaskOption = None
    reason: Annotated[
        DeadLetterReason | None, typer.Option("--reason", case_sensitive=False, help="Only with this reason.")
    ] = None
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            metavar="TIME|AGE",
            help="Only stored since a time, as 2030-01-31T12:00+01:00, or an age, as 90m, 24h, 7d.",
        ),
    ] = None
    before: Annotated[
        str | None, typer.Option("--before", metavar="TIME|AGE", help="Only stored before a time or an age.")
    ] = None

    def dead_letters(self, status: Status) -> DeadLetterFilter:
        """Convert the options to a filter of the database."""
        now = datetime.now(UTC)
        first, last = _moment("--since", self.since, now), _moment("--before", self.before, now)
        if first is not None and last is not None and first >= last:
            raise UsageProblem(
                f"--since {self.since} is not earlier than --before {self.before}: no dead letter can match"
            )
        if self.task is not None and not self.task.strip():
            raise UsageProblem("--task is empty; give category:ClassName, or ClassName alone")
        return {
            "task_name": self.task,
            "reason": self.reason,
            "status": STATUSES[status],
            "since": first,
            "before": last,
        }


@dataclass(frozen=True, kw_only=True)
class Choice(Filters):
    """Options that select dead letters by ids or filters, and confirm the action."""

    dead_letter_ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID", help="Task ids, or numbers in the list; or filters.")
    ] = None
    limit: LimitOption = None
    everything: Annotated[bool, typer.Option("--all", help="All open dead letters that match the filters.")] = (
        False
    )
    yes: YesOption = False

    def dead_letters(self, status: Status) -> DeadLetterFilter:
        """Convert the options to a filter, after checking that ids or filters are given."""
        where = super().dead_letters(status)
        filters = (self.task, self.reason, self.since, self.before)
        by_filter = self.everything or any(value is not None for value in filters)
        if self.dead_letter_ids and (by_filter or self.limit is not None):
            raise UsageProblem("ids and filters exclude each other; give one or the other")
        if not self.dead_letter_ids and not by_filter:
            raise UsageProblem(
                "no dead letters selected; give ids, a filter (--task, --reason, --since, --before), or --all"
            )
        return where

    @property
    def ids(self) -> list[str]:
        """The ids without duplicates; empty when filters select."""
        return list(dict.fromkeys(self.dead_letter_ids or ()))


def _moment(option: str, text: str | None, now: datetime) -> datetime | None:
    if text is None:
        return None
    try:
        if age := _AGE.fullmatch(text.strip().lower()):
            return now - timedelta(**{_UNITS[age[2]]: int(age[1])})
        moment = datetime.fromisoformat(text.strip())
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise UsageProblem(
            f"{option} {shortened(text)} is neither a time nor an age; "
            "write 2030-01-31T12:00+01:00, or 90m, 24h, 7d"
        ) from error


#: Refusals that are shown one by one; the rest is a number.
_REFUSALS_SHOWN = 10
_Result = TypeVar("_Result")

app = command_group(
    "dlq",
    "Inspect, retry and discard dead letters: tasks that failed permanently or could not be executed. They are in "
    "the database DIRACX_DB_URL_TASKDB; `waiting` lists those still in Redis. ID is a task id, or the number in "
    "the list.",
)

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Task id, or the number in the list.")]
StatusOption = Annotated[
    Status,
    typer.Option("--status", case_sensitive=False, help="Only with this status; open: pending or resubmitting."),
]


@app.command("list")
def list_dead_letters(
    *,
    filters: Filters,
    status: StatusOption = "open",
    limit: LimitOption = 100,
    as_json: JsonOption = False,
) -> None:
    """List dead letters, oldest first.

    Example: diracx-task-run dlq list --reason exhausted --since 24h
    """
    where = filters.dead_letters(status)

    async def read(db: TaskDB) -> tuple[list[dict[str, Any]], int]:
        counts = await db.count(**where)
        return [dead_letter async for dead_letter in dead_letter_summaries(db, where, limit)], sum(counts.values())

    dead_letters, total = _in_database(read)
    if as_json:
        echo_json([dead_letter_summary(dead_letter) for dead_letter in dead_letters], indent=2)
        return
    show(DEAD_LETTERS, dead_letters, as_json)
    if 0 < len(dead_letters) < total:
        echo(f"{len(dead_letters)} of {total}; --limit shows more", err=True)


@app.command()
def waiting(*, limit: PageOption = 100, listing: Listing) -> None:
    """List the dead letters that wait in Redis, oldest first.

    A worker with DIRACX_DB_URL_TASKDB moves them into the database; `dlq list` has them then.

    Example: diracx-task-run dlq waiting --json
    """
    listing.show(WAITING_DEAD_LETTERS, operations.waiting_dead_letters, limit=limit)


@app.command("show")
def show_dead_letter(*, dead_letter_id: IdArgument, as_json: JsonOption = False) -> None:
    """Show one dead letter: arguments, reason, and every attempt with its traceback.

    Example: diracx-task-run dlq show 17
    """
    shown = dead_letter_record(_in_database(lambda db: _find(db, dead_letter_id)))
    report(shown, field_lines(_fields(shown)), as_json, indent=2)
    if as_json:
        return
    for number, failure in enumerate(shown["history"], 1):
        why = f"{failure['reason']}: {one_line(failure['detail'])}"
        echo(f"\nearlier failure {number}, {failure['buried_at']}: {why}")
        _print_attempts(failure["attempts"])
    if shown["history"]:
        echo("\nsince then")
    _print_attempts(shown["attempts"])


def _fields(shown: DeadLetter) -> Iterator[tuple[str, str]]:
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


def _print_attempts(attempts: Sequence[DeadLetter]) -> None:
    for number, attempt in enumerate(attempts, 1):
        where = f"{attempt.get('started', '?')} on {attempt.get('host', '?')}"
        failure = f"{attempt.get('type', '?')}: {attempt.get('message', '')}"
        echo_traceback(f"attempt {number}, {where}: {failure}", attempt.get("traceback", ""))


@app.command()
def export(
    *,
    filters: Filters,
    status: StatusOption = "any",
    limit: LimitOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="No effect: the output is always JSON.")] = False,
) -> None:
    """Write dead letters to stdout as JSON lines; `raw` is the message in base64.

    Example: diracx-task-run dlq export --since 2030-01-31 > dead-letters.jsonl
    """
    where = filters.dead_letters(status)

    async def write(db: TaskDB) -> None:
        # One message at a time: each may have megabytes.
        async for summary in dead_letter_summaries(db, where, limit):
            if (dead_letter := await db.find(summary["task_id"])) is not None:
                sys.stdout.write(json.dumps(dead_letter_record(dead_letter)) + "\n")
        sys.stdout.flush()

    with suppress(BrokenPipeError):  # as in `… | head`
        _in_database(write)


@app.command()
def init() -> None:
    """Create the table of dead letters if it does not exist. `diracx-task-run db` upgrades it to new versions.

    Does the same as `python -m diracx.db init-sql`, and supports PostgreSQL. Imports the dead letters of
    diracx-tasks 0.7 from the table dlq_tasks of this database; its rows stay.

    Example: diracx-task-run dlq init
    """

    async def create() -> tuple[bool, int]:
        from ...plumbing.persistence.published import import_published

        async with open_database("TaskDB", NO_TASK_DB, tables=False) as db:
            return await db.migrations.create(db.engine), await import_published(db)

    created, imported = asyncio.run(create())
    echo("created the table DeadLetters" if created else "the table DeadLetters exists")
    if imported:
        echo(f"{imported} dead letters imported from dlq_tasks, the table of diracx-tasks 0.7")


@app.command()
def retry(*, choice: Choice, as_json: JsonOption = False, server: ServerAndTasks) -> None:
    """Submit dead letters again, with their task ids and with all their retries.

    Each is submitted once, even if the command is repeated or run by several users. Exits with 1 if one of them
    could not be submitted.

    Example: diracx-task-run dlq retry --task my_tasks:Download --since 24h --yes
    """
    where = choice.dead_letters("open")
    registry, config = server.registry, tasks_config()

    async def submit(broker: RedisStreamBroker, db: TaskDB, chosen: DeadLetters, by: SelectedBy) -> Decided:
        resubmitter = Resubmitter(db, broker, registry, config)
        return await AuditedActions.for_command_line(broker.redis).retry_dead_letters(resubmitter, chosen, by)

    decided = _decide(choice, where, server, "Submit {} dead letters again?", submit)
    done = {"resubmitted": decided.done, "already": decided.already}
    _report(decided, done, "submitted again", as_json)


@app.command()
def discard(*, choice: Choice, as_json: JsonOption = False, server: Server) -> None:
    """Mark dead letters as discarded, so that they are not submitted again. Their rows stay.

    Needs the Redis server for the audit log. Exits with 1 if one of them could not be discarded.

    Example: diracx-task-run dlq discard --reason unparsable --yes
    """
    where = choice.dead_letters("pending")

    async def mark(broker: RedisStreamBroker, db: TaskDB, chosen: DeadLetters, by: SelectedBy) -> Decided:
        return await AuditedActions.for_command_line(broker.redis).discard_dead_letters(db, chosen, by)

    decided = _decide(choice, where, server, "Discard {} dead letters?", mark)
    _report(decided, {"discarded": decided.done}, "discarded", as_json)


def _decide(
    choice: Choice,
    where: DeadLetterFilter,
    server: Server,
    question: str,
    act: Callable[[RedisStreamBroker, TaskDB, DeadLetters, SelectedBy], Awaitable[Decided]],
) -> Decided:
    """Call `act` with the dead letters of the ids; without ids, after confirmation, with those of the filter."""

    async def decide(db: TaskDB) -> Decided:
        chosen = [await _find(db, dead_letter_id, summary=True) for dead_letter_id in choice.ids]
        if not chosen:
            total = sum((await db.count(**where)).values())
            total = total if choice.limit is None else min(total, choice.limit)
            if not total:
                return Decided([], [], [])
            await asyncio.to_thread(confirm, question.format(total), choice.yes)
            chosen = [each async for each in dead_letter_summaries(db, where, choice.limit)]
        async with server.connected() as broker:
            return await act(broker, db, chosen, None if choice.ids else where)

    return _in_database(decide)


def _report(decided: Decided, done: Mapping[str, DeadLetters], what: str, as_json: bool) -> None:
    """Print what was done. Raise a CliError if some were refused, after the reasons if there are several."""

    def ids(dead_letter: DeadLetter) -> dict[str, Any]:
        return {"id": dead_letter["id"], "task_id": dead_letter["task_id"]}

    if as_json:
        records = {name: list(map(ids, dead_letters)) for name, dead_letters in done.items()}
        refused = [ids(dead_letter) | {"why": why} for dead_letter, why in decided.refused]
        print_json({**records, "refused": refused}, indent=None)
    elif decided.done or decided.already:
        already = f", {len(decided.already)} had been already" if decided.already else ""
        echo(f"{len(decided.done)} {what}{already}")
    elif not decided.refused:
        echo("no dead letters", err=True)
    if len(decided.refused) == 1:
        [(dead_letter, why)] = decided.refused
        raise CliError(f"dead letter {dead_letter['id']} ({dead_letter['task_id']}) was not {what}: {why}")
    if decided.refused:
        for dead_letter, why in decided.refused[:_REFUSALS_SHOWN]:
            echo(one_line(f"dead letter {dead_letter['id']} ({dead_letter['task_id']}): {why}"), err=True)
        raise CliError(f"{len(decided.refused)} dead letters were not {what}")


def _in_database(use: Callable[[TaskDB], Awaitable[_Result]]) -> _Result:
    async def run() -> _Result:
        async with open_database("TaskDB", NO_TASK_DB) as db:
            return await use(db)

    return asyncio.run(run())


async def _find(db: TaskDB, dead_letter_id: str, *, summary: bool = False) -> dict[str, Any]:
    dead_letter = await (db.find_summary if summary else db.find)(dead_letter_id)
    if dead_letter is None:
        raise CliError(f"no dead letter {dead_letter_id!r}; `diracx-task-run dlq list --status any` lists all")
    return dead_letter
