"""Pilots by VO, compute element and state; compute elements; one pilot with its history."""

from __future__ import annotations

__all__ = ["ACTIONS", "PAGES"]

from itertools import pairwise
from typing import Any

from diracx.tasks.dashboard.page import (
    Action,
    Form,
    Installation,
    NotFoundError,
    NotPossibleError,
    Operator,
    Page,
    Question,
    Request,
    integer,
)

from gubbins.deeds import Deed
from gubbins.exceptions import GubbinsError, PilotNotFoundError, UnknownCEError
from gubbins.logic import my_pilots as logic
from gubbins.pilot_states import ACTIVE, MyPilotStatus

from .store import HOURS, STORE

_PAGE = 50
#: A page has no more rows; choosing a VO narrows it down.
_MOST, _MOST_CES = 150, 80
_STATES = [str(state) for state in MyPilotStatus]


async def _chosen_vo(request: Request, installation: Installation) -> str | None:
    """The VO whose pilots are to be shown; None: those of all, for whoever may see them.

    Raises:
        NotFoundError: it is not that of whoever asks, or there is none of that name.
    """
    wanted, own = request.query_params.get("vo") or None, request.state.principal.vo
    if own is not None and wanted not in (None, own):
        raise NotFoundError(f"{wanted!r:.40} is not your VO, which is {own!r}.")
    if wanted is not None and own is None and wanted not in await _known_vos(installation):
        raise NotFoundError(f"There is no VO {wanted[:40]!r}.")
    return own or wanted


async def _known_vos(installation: Installation) -> set[str]:
    """Those of the configuration, those that have pilots, and those that compute elements serve."""
    served = {vo for ce in await STORE.ces() for vo in ce["vos"] or ()}
    return {*(await installation.settings()).vos, *await STORE.summary(None), *served}


async def _ces(vo: str | None) -> list[dict[str, Any]]:
    return [ce for ce in await STORE.ces() if vo is None or ce["vos"] is None or vo in ce["vos"]]


async def _overview(request: Request, installation: Installation) -> dict[str, Any]:
    vo = await _chosen_vo(request, installation)
    summary = await STORE.summary(request.state.principal.vo)
    course = await STORE.course(vo)
    ces = await _ces(vo)
    shown = {name: by_ce for name, by_ce in summary.items() if vo in (None, name)}
    rows = [(name, ce, states) for name, by_ce in shown.items() for ce, states in by_ce.items()]
    return {
        "vo": vo,
        "vos": sorted(summary),
        "bound": request.state.principal.vo is not None,
        "rows": rows[:_MOST],
        "hidden": max(0, len(rows) - _MOST),
        "hidden_ces": max(0, len(ces) - _MOST_CES),
        "states": _STATES,
        "totals": {state: sum(states.get(state, 0) for _, _, states in rows) for state in _STATES},
        "ces": [
            ce | {"rate": _rate(course.failed.get(ce["name"], 0), course.ended.get(ce["name"], 0))}
            for ce in ces[:_MOST_CES]
        ],
        "capacity": sum(ce["capacity"] for ce in ces),
        "active": sum(ce["active"] for ce in ces),
        "free": sum(ce["available_slots"] for ce in ces if ce["enabled"]),
        "closed": sum(not ce["enabled"] for ce in ces),
        "since": course.since,
        "hours": HOURS,
    }


def _rate(failed: int, ended: int) -> float | None:
    return failed / ended if ended else None


async def _charts(request: Request, installation: Installation) -> dict[str, Any]:
    return (await STORE.course(await _chosen_vo(request, installation))).charts


async def _list(request: Request, installation: Installation) -> dict[str, Any]:
    query = request.query_params
    status = query.get("status") or None
    if status is not None and status not in _STATES:
        raise NotFoundError(f"{status[:40]!r} is no state of a pilot.")
    try:
        number = integer(query.get("page", "1"), 1, 1_000_000)
    except NotPossibleError as error:
        raise NotFoundError(str(error)) from error
    total, pilots = await logic.search_pilots(
        STORE.database(),
        vo=await _chosen_vo(request, installation),
        ce_name=query.get("ce") or None,
        status=None if status is None else MyPilotStatus(status),
        page=number,
        per_page=_PAGE,
    )
    return {
        "pilots": pilots,
        "total": total,
        "number": number,
        "pages": -(-total // _PAGE),
        "chosen": {name: query.get(name, "") for name in ("vo", "ce", "status")},
        "states": _STATES,
        "vos": sorted(await STORE.summary(request.state.principal.vo)),
        "ces": [ce["name"] for ce in await _ces(request.state.principal.vo)],
    }


async def _one(request: Request, installation: Installation) -> dict[str, Any]:
    try:
        number = integer(request.path_params["pilot"], 1)
        pilot = await logic.get_pilot(STORE.database(), number)
        _check_vo(pilot, request.state.principal.vo)
    except (NotPossibleError, PilotNotFoundError) as error:
        raise NotFoundError(f"There is no pilot {request.path_params['pilot'][:40]!r}.") from error
    steps = pilot["history"]
    took = [
        None,
        *((after["at"] - before["at"]).total_seconds() for before, after in pairwise(steps)),
    ]
    return {"pilot": pilot, "steps": list(zip(steps, took, strict=True)), "active": pilot["status"] in ACTIVE}


def _check_vo(pilot: dict[str, Any], vo: str | None) -> None:
    """Of a pilot of another VO nobody learns that there is one."""
    if vo not in (None, pilot["vo"]):
        raise PilotNotFoundError(pilot["pilot_id"])


# --- actions ------------------------------------------------------------------------------------------------


async def _ce(form: Form) -> dict[str, Any]:
    name = form.one("ce")
    found = [ce for ce in await STORE.ces() if ce["name"] == name]
    if not found:
        raise NotPossibleError(str(UnknownCEError(name)))
    return found[0]


async def _ask_close(form: Form, installation: Installation) -> Question:
    ce = await _ce(form)
    return Question(
        f"Close {ce['name']} for new pilots?",
        f"The {ce['active']} pilots that hold a slot there go on to their end; no VO submits more until somebody "
        "opens it again." + _about_ban(ce, "Closing lifts the ban: pilots that are there are looked at again."),
        "Close it",
    )


async def _ask_open(form: Form, installation: Installation) -> Question:
    ce = await _ce(form)
    return Question(
        f"Open {ce['name']} for new pilots?",
        f"The next round of submission fills its free slots: {ce['available_slots']} of {ce['capacity']}."
        + _about_ban(ce, "Opening lifts the ban.")
        + " Pauses after failed calls end, too.",
        "Open it",
    )


def _about_ban(ce: dict[str, Any], lifted: str) -> str:
    if ce["banned_at"] is None:
        return ""
    return f" It is banned: {ce['ban_reason'] or 'no reason was given'}. {lifted}"


async def _close(form: Form, operator: Operator) -> str:
    return await _switch(form, operator, False)


async def _open(form: Form, operator: Operator) -> str:
    return await _switch(form, operator, True)


async def _switch(form: Form, operator: Operator, enabled: bool) -> str:
    name, state = form.one("ce"), "open" if enabled else "closed"

    async def do() -> str:
        if operator.vo is not None:
            raise NotPossibleError("compute elements are for those who may see the pilots of all VOs")
        try:
            changed = await logic.set_ce_enabled(STORE.database(), name, enabled)
        except UnknownCEError as error:
            raise NotPossibleError(str(error)) from error
        return state if changed else f"was {state} already"

    outcome = await operator.perform(Deed.OPEN_CE if enabled else Deed.CLOSE_CE, name, do)
    return f"{name}: {outcome}."


async def _ask_cancel(form: Form, installation: Installation) -> Question:
    number = integer(form.one("pilot"), 1)
    return Question(
        f"Cancel pilot {number}?",
        "Its compute element is asked to end it. Its state changes when the compute element says that it has "
        "ended.",
        "Cancel it",
        dangerous=True,
    )


async def _cancel(form: Form, operator: Operator) -> str:
    number = integer(form.one("pilot"), 1)

    async def do() -> str:
        try:
            _check_vo(await logic.get_pilot(STORE.database(), number), operator.vo)
            pilot = await logic.cancel_pilot(STORE.database(), number, by=operator.who)
        except GubbinsError as error:
            raise NotPossibleError(str(error)) from error
        return f"requested at {pilot['ce_name']}"

    return f"The end of pilot {number} was {await operator.perform(Deed.CANCEL_PILOT, str(number), do)}."


PAGES = [
    Page("/pilots", "pilots", "Pilots", _overview, section="Pilots", charts=_charts),
    Page("/pilots/list", "pilot_list", "List of pilots", _list, nav="/pilots"),
    Page("/pilots/{pilot}", "pilot", "Pilot", _one, nav="/pilots"),
]
ACTIONS = [
    Action("/pilots/ce/close", _ask_close, _close),
    Action("/pilots/ce/open", _ask_open, _open),
    Action("/pilots/cancel", _ask_cancel, _cancel),
]
