"""Pages of dead letters, with actions to submit them again or discard them, by number or by filter."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from diracx.db.exceptions import DBUnavailableError
from sqlalchemy.exc import SQLAlchemyError

from ....operations import waiting_dead_letters
from ....operations.dead_letters import STATUSES, Decided, dead_letter_arguments, find_dead_letter
from ....operations.health.runner import database_error
from ....operations.views import WAITING_DEAD_LETTERS
from ....plumbing.persistence import DeadLetterReason
from ...operator import task_db_of
from ..page import (
    Action,
    AppContext,
    Form,
    NotFoundError,
    NotPossibleError,
    Operator,
    Page,
    Question,
    Request,
    integer,
    viewer_of,
)
from ..tables import Table

if TYPE_CHECKING:
    from ....plumbing.persistence.db import DeadLetterFilter

_PAGE = 50
#: Timeout of the database.
_RESPONSE_SECONDS = 5.0
#: Maximum number of dead letters of one action, for which a browser waits.
_MOST = 10_000
#: Maximum number of listed dead letters in Redis.
_WAITING_SHOWN = 30
_REASONS = [str(reason) for reason in DeadLetterReason]
_AGES = {"1h": timedelta(hours=1), "24h": timedelta(days=1), "7d": timedelta(days=7), "30d": timedelta(days=30)}


async def _list(request: Request, context: AppContext) -> dict[str, Any]:
    query, viewer = request.query_params, viewer_of(request)
    chosen = {name: query.get(name, "").strip() for name in ("task", "reason", "since")}
    status = query.get("status") or "open"
    shown: dict[str, Any] = {
        "dead_letters": [],
        "total": 0,
        "chosen": chosen,
        "status": status,
        "reasons": _REASONS,
        "statuses": list(STATUSES),
        "ages": list(_AGES),
        "configured": context.task_db is not None,
        "most": _MOST,
        "after": None,
        "away": None,
        "waiting": (await context.snapshot()).dead_letters_waiting,
    }
    if shown["waiting"]:
        read = partial(waiting_dead_letters, context.redis, registry=context.registry)
        rows = (await viewer.page(read, _WAITING_SHOWN, None)).items
        caption = "Waiting in Redis."
        if shown["waiting"] > len(rows):
            number = f"{len(rows)} of {shown['waiting']:,}"
            caption = f"Waiting in Redis: {number}; `diracx-task-run dlq waiting` lists all."
        shown["waiting_table"] = Table(view=WAITING_DEAD_LETTERS, rows=rows, caption=caption)
    if context.task_db is None:
        return shown
    try:
        where: DeadLetterFilter = {**_where(chosen, status), "vo": viewer.vo}
        after = integer(query.get("after", "0"), most=2**31 - 1)
    except NotPossibleError as error:
        raise NotFoundError(str(error)) from error
    try:
        async with asyncio.timeout(_RESPONSE_SECONDS):
            dead_letters = await context.task_db.summaries(**where, limit=_PAGE, after_id=after)
            total = sum((await context.task_db.count(**where)).values())
    except (SQLAlchemyError, DBUnavailableError, OSError, TimeoutError) as error:
        return shown | {"away": database_error(error)}
    more = str(dead_letters[-1]["id"]) if len(dead_letters) == _PAGE else None
    return shown | {"dead_letters": dead_letters, "total": total, "after": more}


async def _one(request: Request, context: AppContext) -> dict[str, Any]:
    key = request.path_params["dead_letter"]
    if context.task_db is None:
        raise NotFoundError("No database of dead letters is configured here.")
    dead_letter = await find_dead_letter(context.task_db, key, viewer_of(request))
    if dead_letter is None:
        raise NotFoundError(f"There is no dead letter {key!r}.")
    arguments = dead_letter_arguments(dead_letter, context.registry)
    return {"dead_letter": dead_letter, "arguments": arguments, "size": len(dead_letter["message"])}


def _where(chosen: dict[str, str], status: str) -> DeadLetterFilter:
    for value, known in ((status, STATUSES), (chosen["reason"], _REASONS), (chosen["since"], _AGES)):
        if value and value not in known:
            raise NotPossibleError(f"{value[:40]!r} is none of {', '.join(known)}")
    return {
        "task_name": chosen["task"] or None,
        "reason": chosen["reason"] or None,
        "status": STATUSES[status],
        "since": datetime.now(UTC) - _AGES[chosen["since"]] if chosen["since"] else None,
    }


def _of_form(form: Form, status: str) -> tuple[list[int] | None, DeadLetterFilter]:
    """Return the numbers of the selected dead letters, or None and the filter if all are selected."""
    if form.one("scope") == "all":
        return None, _where({name: form.one(name) for name in ("task", "reason", "since")}, status)
    numbers = form.numbers("dead_letter")
    if not numbers:
        raise NotPossibleError("No dead letter is selected.")
    return numbers, {}


async def _selected(form: Form, context: AppContext, status: str) -> tuple[int, list[str]]:
    """Return the number of dead letters that a form selects, and a description of them."""
    db = task_db_of(context)
    numbers, where = _of_form(form, status)
    if numbers is not None:
        return len(numbers), [f"number {number}" for number in numbers]
    total = sum((await db.count(**where)).values())
    if not total:
        raise NotPossibleError("No dead letter matches the filter.")
    filters = [f"{name}: {form.one(name)}" for name in ("task", "reason", "since") if form.one(name)]
    return min(total, _MOST), filters or ["all open dead letters"]


async def _ask_retry(form: Form, context: AppContext) -> Question:
    number, details = await _selected(form, context, "open")
    consequence = (
        "They are submitted with their task ids and with all their retries; each once, even if this is repeated."
    )
    return Question(f"Submit {_dead_letters(number)} again?", consequence, "Submit again", details)


async def _ask_discard(form: Form, context: AppContext) -> Question:
    number, details = await _selected(form, context, "pending")
    consequence = "They cannot be submitted again. Their rows stay in the database, marked as discarded."
    return Question(f"Discard {_dead_letters(number)}?", consequence, "Discard", details, dangerous=True)


async def _retry(form: Form, operator: Operator) -> str:
    return _summary_of(await operator.retry(*_of_form(form, "open"), _MOST), "submitted again")


async def _discard(form: Form, operator: Operator) -> str:
    return _summary_of(await operator.discard(*_of_form(form, "pending"), _MOST), "discarded")


def _summary_of(decided: Decided, verb: str) -> str:
    parts = [f"{_dead_letters(len(decided.done))} {verb}"]
    if decided.already:
        parts.append(f"{len(decided.already)} had been already")
    if decided.refused:
        first, why = decided.refused[0]
        parts.append(f"{len(decided.refused)} not: number {first['id']}: {why}")
    text = "; ".join(parts) + "."
    if not decided.done and decided.refused:
        raise NotPossibleError(text)
    return text


def _dead_letters(number: int) -> str:
    return "1 dead letter" if number == 1 else f"{number} dead letters"


PAGES = [
    Page("/dead-letters", "dead_letters", "Dead letters", _list, section="Problems", live=False, per_vo=True),
    Page(
        "/dead-letters/{dead_letter}",
        "dead_letter",
        "Dead letter",
        _one,
        nav="/dead-letters",
        live=False,
        per_vo=True,
    ),
]
ACTIONS = [
    Action("/dead-letters/retry", _ask_retry, _retry, per_vo=True),
    Action("/dead-letters/discard", _ask_discard, _discard, per_vo=True),
]
