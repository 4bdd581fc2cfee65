"""Actions of the dashboard: open, close and ban compute elements, downtimes, cancellation of pilots."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from diracx.tasks.web.dashboard.page import (
    Action,
    AppContext,
    Form,
    NotPossibleError,
    Operator,
    Question,
    integer,
)

from gubbins.domain import clock
from gubbins.domain.audit_actions import AuditAction
from gubbins.domain.downtimes import parse_moment
from gubbins.domain.exceptions import GubbinsError, PilotEndedError, UnknownCEError
from gubbins.domain.pilot_states import ACTIVE
from gubbins.logic import my_pilots as logic
from gubbins.logic.my_pilots.site_calls import site_calls

from .read_models import READ_MODELS

_MAX_REASON_CHARS = 500
_MAX_NAME_CHARS = 128


async def _ce(form: Form) -> dict[str, Any]:
    name = form.one("ce")
    found = [ce for ce in await READ_MODELS.ces() if ce["name"] == name]
    if not found:
        raise NotPossibleError(str(UnknownCEError(name[:_MAX_NAME_CHARS])))
    return found[0]


async def _confirm_close(form: Form, context: AppContext) -> Question:
    ce = await _ce(form)
    return Question(
        f"Close {ce['name']} for new pilots?",
        f"Its {ce['active']} active pilots continue; no VO submits more until it is opened again."
        + _about_ban(ce, "Closing lifts the ban: its pilots are polled again."),
        "Close it",
    )


async def _confirm_open(form: Form, context: AppContext) -> Question:
    ce = await _ce(form)
    return Question(
        f"Open {ce['name']} for new pilots?",
        f"The next round of submission fills its free slots: {ce['available_slots']} of {ce['capacity']}."
        + _about_ban(ce, "Opening lifts the ban.")
        + " Its circuits are closed.",
        "Open it",
    )


def _about_ban(ce: dict[str, Any], lifted: str) -> str:
    if ce["banned_at"] is None:
        return ""
    return f" It is banned: {ce['ban_reason'] or 'no reason was given'}. {lifted}"


async def _confirm_ban(form: Form, context: AppContext) -> Question:
    ce = await _ce(form)
    return Question(
        f"Ban {ce['name']}?",
        f"There are no submissions and no polls until it is opened or closed: the states of its "
        f"{ce['active']} active pilots do not change. To drain it, close it instead.",
        "Ban it",
        reason="Reason, shown to all users",
    )


async def _switch(form: Form, operator: Operator, *, enabled: bool) -> str:
    name, state = form.one("ce"), "open" if enabled else "closed"

    async def switch() -> str:
        changed = await logic.set_ce_enabled(READ_MODELS.database(), name, enabled)
        return state if changed else f"was {state} already"

    action = AuditAction.OPEN_CE if enabled else AuditAction.CLOSE_CE
    return f"{name}: {await _perform(operator, action, name, switch)}."


async def _ban(form: Form, operator: Operator) -> str:
    name, reason = form.one("ce"), " ".join(form.one("reason").split())[:_MAX_REASON_CHARS]
    if not reason:
        raise NotPossibleError("A ban needs a reason.")

    async def ban() -> str:
        changed = await logic.ban_ce(READ_MODELS.database(), name, reason=reason)
        return f"banned, {reason}" if changed else "was banned already"

    return f"{name}: {await _perform(operator, AuditAction.BAN_CE, name, ban)}."


async def _perform(operator: Operator, action: AuditAction, name: str, do: Callable[[], Awaitable[str]]) -> str:
    # Checked first, so that refused actions are not in the audit log.
    if operator.vo is not None:
        raise NotPossibleError("compute elements are managed by users who may see the pilots of all VOs")
    if name not in {ce["name"] for ce in await READ_MODELS.ces()}:
        raise NotPossibleError(UnknownCEError(name[:_MAX_NAME_CHARS]).public)
    with _refusals():
        return await operator.perform(action, name, do)


@contextmanager
def _refusals() -> Iterator[None]:
    """Show errors of the logic layer to the operator."""
    try:
        yield
    except GubbinsError as error:
        raise NotPossibleError(str(error)) from error


async def _confirm_downtime(form: Form, context: AppContext) -> Question:
    ce = await _ce(form)
    return Question(
        f"Plan a downtime of {ce['name']}?",
        f"From its start to its end it gets no pilots and raises no alerts. Its {ce['active']} active pilots "
        "continue.",
        "Plan it",
        reason="Start, end (UTC) and reason, as 2026-12-01T08:00 2026-12-01T18:00 new switches",
    )


async def _add_downtime(form: Form, operator: Operator) -> str:
    name, (start, end, *why) = form.one("ce"), (*form.one("reason").split(), "", "")
    try:
        starts_at, ends_at = parse_moment(start), parse_moment(end)
    except ValueError as error:
        raise NotPossibleError(f"Give start, end and the reason in one line: {error}") from error

    async def add() -> str:
        reason, db = " ".join(why)[:_MAX_REASON_CHARS], READ_MODELS.database()
        added = await logic.add_downtime(db, name, starts_at, ends_at, reason, by=operator.who)
        return f"planned, {added.describe(clock.now())}"

    return f"{name}: downtime {await _perform(operator, AuditAction.ADD_DOWNTIME, name, add)}."


async def _confirm_end_downtime(form: Form, context: AppContext) -> Question:
    ce = await _ce(form)
    if ce["downtime"] is None:
        raise NotPossibleError(f"{ce['name']} is not in downtime.")
    return Question(
        f"End the downtime of {ce['name']}?",
        f"It is {ce['downtime'].describe(clock.now())}. The next round of submission fills its free slots.",
        "End it",
        fields={"downtime": [str(ce["downtime"].id)]},
    )


async def _end_downtime(form: Form, operator: Operator) -> str:
    name, number = form.one("ce"), integer(form.one("downtime"), 1)

    async def end() -> str:
        await logic.remove_downtime(READ_MODELS.database(), number, name)
        return "ended"

    return f"{name}: downtime {await _perform(operator, AuditAction.REMOVE_DOWNTIME, name, end)}."


async def _confirm_cancel(form: Form, context: AppContext) -> Question:
    number = integer(form.one("pilot"), 1)
    return Question(
        f"Cancel pilot {number}?",
        "Its state changes when the compute element reports that it has ended.",
        "Cancel it",
        dangerous=True,
    )


async def _cancel(form: Form, operator: Operator) -> str:
    number = integer(form.one("pilot"), 1)

    async def do() -> str:
        calls = await site_calls()
        pilot = await calls.cancel(READ_MODELS.database(), number, by=operator.who, user=operator.who)
        return f"requested at {pilot['ce_name']}"

    with _refusals():
        pilot = await logic.get_pilot(READ_MODELS.database(), number, operator.vo)
        if pilot["status"] not in ACTIVE:
            raise PilotEndedError(number, pilot["status"])
        done = await operator.perform(AuditAction.CANCEL_PILOT, str(number), do)
    return f"The cancellation of pilot {number} was {done}."


ACTIONS = [
    Action("/pilots/ce/close", _confirm_close, partial(_switch, enabled=False)),
    Action("/pilots/ce/open", _confirm_open, partial(_switch, enabled=True)),
    Action("/pilots/ce/ban", _confirm_ban, _ban),
    Action("/pilots/ce/downtime", _confirm_downtime, _add_downtime),
    Action("/pilots/ce/downtime/end", _confirm_end_downtime, _end_downtime),
    Action("/pilots/cancel", _confirm_cancel, _cancel, per_vo=True),
]
