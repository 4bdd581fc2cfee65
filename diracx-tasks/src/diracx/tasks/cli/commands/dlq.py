"""`dlq`: look at dead letters, and decide about them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ...plumbing.persistence.letter import DeadLetterStatus
from ..errors import CliError, UsageProblem, explained_redis
from ..options import JsonOption, ModuleOption, RedisUrlFileOption, RedisUrlOption, resolve_redis_url, spread
from ..output import echo, echo_json
from .dlq_filters import Choice, Filters, LimitOption, StatusFilter
from .inspect import AfterOption, ask, print_json

if TYPE_CHECKING:
    from ...plumbing.persistence import TaskDB
    from ...plumbing.persistence.db import LetterFilter

_PAGE = 200
_Answer = TypeVar("_Answer")

app = typer.Typer(
    name="dlq",
    help="Dead letters: tasks that failed for good, or that nobody could run. They are in the database "
    "DIRACX_DB_URL_TASKDB; `waiting` has those that wait for one. ID is a task id, or the number in the list.",
    rich_markup_mode="rich",
)

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Task id, or the number in the list.")]
StatusOption = Annotated[
    StatusFilter,
    typer.Option("--status", case_sensitive=False, help="What was decided; open: pending or resubmitting."),
]


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@app.command("list")
@spread
def list_letters(
    filters: Filters,
    status: StatusOption = StatusFilter.OPEN,
    limit: LimitOption = 100,
    as_json: JsonOption = False,
) -> None:
    """List dead letters, oldest first; those about which nothing was decided, if nothing else is asked for.

    Example: diracx-task-run dlq list --reason exhausted --since 24h
    """
    where = filters.letters(status)

    async def look(db: TaskDB) -> tuple[list[dict[str, Any]], int]:
        counts = await db.count(**where)
        letters = [letter async for letter in _pages(db, where, limit)]
        return letters, sum(counts.values())

    from ...operations.dead_letters import letter_summary
    from .dlq_view import print_table

    letters, total = _with_db(look)
    if as_json:
        echo_json([letter_summary(letter) for letter in letters], indent=2)
    else:
        print_table(letters, total)


@app.command()
def waiting(
    limit: LimitOption = 100,
    after: AfterOption = None,
    as_json: JsonOption = False,
    module: ModuleOption = None,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """List the dead letters that wait in Redis, oldest first: no worker with a database has taken them yet.

    They are moved into the database, and into `dlq list`, when a worker with DIRACX_DB_URL_TASKDB starts.

    Example: diracx-task-run dlq waiting --json
    """
    from ... import operations as monitor
    from ..runtime.registry import load_registry
    from .monitor_view import print_waiting_letters

    registry = load_registry(module)
    page = ask(
        redis_url,
        redis_url_file,
        lambda redis: monitor.waiting_letters(redis, limit or 100, after, registry=registry),
    )
    if as_json:
        print_json(page)
    else:
        print_waiting_letters(page)


@app.command()
def show(letter_id: IdArgument, as_json: JsonOption = False) -> None:
    """Show one dead letter: its arguments, why it is here, and every attempt with its traceback.

    Example: diracx-task-run dlq show 17
    """
    from ...operations.dead_letters import letter_record
    from ...operations.masking import masked_json
    from .dlq_view import print_letter

    letter = _with_db(lambda db: _find(db, letter_id))
    if as_json:
        echo_json(masked_json(letter_record(letter)), indent=2)
    else:
        print_letter(letter)


@app.command()
@spread
def retry(
    choice: Choice,
    as_json: JsonOption = False,
    module: ModuleOption = None,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """Submit dead letters again, under their old task ids and with all their retries.

    Each is submitted once, however often this is repeated and whoever else does it at the same time. Exits with 1
    when one of them could not be.

    Example: diracx-task-run dlq retry --task my_tasks:Download --since 24h --yes
    """
    where = choice.letters(StatusFilter.OPEN)
    url = resolve_redis_url(redis_url, redis_url_file)

    async def submit(db: TaskDB) -> list[Any]:
        from ...operations.audited_actions import Deeds
        from ...plumbing.persistence.resubmission import Resubmitter
        from ..runtime.broker import open_broker
        from ..runtime.environment import tasks_config
        from ..runtime.registry import load_registry

        chosen = [await _find(db, letter_id, summary=True) for letter_id in choice.ids]
        registry = load_registry(module)
        config = tasks_config()
        async with open_broker(url) as broker:
            resubmitter = Resubmitter(db, broker, registry, config)
            with explained_redis(url):
                if not chosen:
                    await _confirmed(db, where, choice, "Submit {} dead letters again?")
                deeds = Deeds.at_command_line(broker.redis)
                return await deeds.retry_letters(resubmitter, chosen or None, where, choice.limit)

    from .dlq_view import report_retry

    report_retry(_with_db(submit), as_json)


@app.command()
@spread
def discard(
    choice: Choice,
    as_json: JsonOption = False,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
) -> None:
    """Decide that dead letters will not run again. Their rows stay, as discarded.

    The server is needed for the audit log. Exits with 1 when one of them could not be discarded.

    Example: diracx-task-run dlq discard --reason unparsable --yes
    """
    where = choice.letters(StatusFilter.PENDING)
    url = resolve_redis_url(redis_url, redis_url_file)

    async def decide(db: TaskDB) -> tuple[list[Mapping[str, Any]], list[tuple[Mapping[str, Any], str]]]:
        from ...operations.audited_actions import Deeds
        from ..runtime.broker import open_broker

        chosen = [await _find(db, letter_id, summary=True) for letter_id in choice.ids]
        if not chosen:
            await _confirmed(db, where, choice, "Discard {} dead letters?")
            chosen = [letter async for letter in _pages(db, where, choice.limit)]
        if not chosen:
            return [], []
        async with open_broker(url) as broker:
            with explained_redis(url):
                deeds = Deeds.at_command_line(broker.redis)
                done = await deeds.discard_letters(db, chosen, None if choice.ids else where)
        refused: list[tuple[Mapping[str, Any], str]] = [
            (letter, _why_not_discarded(letter)) for letter in chosen if letter["id"] not in done
        ]
        return [letter for letter in chosen if letter["id"] in done], refused

    from .dlq_view import report_discard

    report_discard(*_with_db(decide), as_json)


@app.command()
@spread
def export(
    filters: Filters,
    status: StatusOption = StatusFilter.ANY,
    limit: LimitOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Changes nothing: it is JSON already.")] = False,
) -> None:
    """Write dead letters to stdout, one JSON object a line, with all there is; `raw` is the message in base64.

    Example: diracx-task-run dlq export --since 2030-01-31 > letters.jsonl
    """
    where = filters.letters(status)

    async def write(db: TaskDB) -> None:
        from ...operations.dead_letters import letter_record

        async for summary in _pages(db, where, limit):  # one body at a time: each may have megabytes
            letter = await db.find(summary["task_id"])
            if letter is None:
                continue
            sys.stdout.write(json.dumps(letter_record(letter)) + "\n")
        sys.stdout.flush()

    try:
        _with_db(write)
    except BrokenPipeError:  # as in `… | head`; nobody reads what else there is
        import os

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.command()
def init() -> None:
    """Create the table of dead letters where it is not there yet. `diracx-task-run db` takes it to new versions.

    As `python -m diracx.db init-sql` does, which knows no PostgreSQL.

    Example: diracx-task-run dlq init
    """
    from ..runtime.environment import required_task_db

    async def create() -> None:
        async with required_task_db(create=True):
            pass

    asyncio.run(create())
    echo("the table DeadLetters is there")


def _with_db(use: Callable[[TaskDB], Coroutine[Any, Any, _Answer] | Awaitable[_Answer]]) -> _Answer:
    from ...plumbing.task_names import AmbiguousTaskNameError
    from ..runtime.environment import required_task_db

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


async def _pages(db: TaskDB, where: LetterFilter, limit: int | None) -> AsyncIterator[dict[str, Any]]:
    """Dead letters as lists have them."""
    after_id, left = 0, limit
    while left is None or left > 0:
        page = await db.summaries(**where, limit=_PAGE if left is None else min(_PAGE, left), after_id=after_id)
        if not page:
            return
        after_id = page[-1]["id"]
        left = None if left is None else left - len(page)
        for letter in page:
            yield letter


async def _confirmed(db: TaskDB, where: LetterFilter, choice: Choice, question: str) -> None:
    """Ask whoever sits there.

    Raises:
        UsageProblem: when nobody does.
        CliError: when the answer is no.
    """
    if choice.yes:
        return
    total = sum((await db.count(**where)).values())
    total = total if choice.limit is None else min(total, choice.limit)
    if total == 0:
        return
    asked = question.format(total)
    if not sys.stdin.isatty():
        raise UsageProblem(f"{asked} There is no terminal to ask on; add --yes")
    if not await asyncio.to_thread(typer.confirm, asked, err=True):
        raise CliError("nothing was changed")


def _why_not_discarded(letter: Mapping[str, Any]) -> str:
    match letter["status"]:
        case DeadLetterStatus.RESUBMITTED:
            return "it was submitted again, and is no longer here to be discarded"
        case DeadLetterStatus.RESUBMITTING:
            return "its re-submission has begun; finish that with `diracx-task-run dlq retry`"
    return "somebody else has just decided about it; look again"
