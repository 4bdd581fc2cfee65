"""Dashboard pages: overview of pilots and compute elements, list of pilots, one pilot, its output."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from diracx.tasks.web.dashboard.page import AppContext, NotFoundError, NotPossibleError, Page, Request, integer

from gubbins.domain.circuit_breaker import CircuitState
from gubbins.domain.exceptions import (
    CEUnavailableError,
    OutputUnavailableError,
    PilotNotFoundError,
    RegistryUnavailableError,
    SiteBusyError,
)
from gubbins.domain.pilot_states import ACTIVE, MyPilotStatus
from gubbins.logic import my_pilots as logic
from gubbins.logic.my_pilots.site_calls import site_calls

from .read_models import HOURS, READ_MODELS, PilotStatistics

_PAGE = 50
#: Compute elements, and rows of pilots, on a page.
_CES, _ROWS = 40, 60
#: Characters of output on a page; escaped ones take five bytes each.
_OUTPUT_CHARS = 16_000
_STATES = [str(state) for state in MyPilotStatus]
_STALE = "stale"
_CE_STATES = ("open", "closed", "banned", "failing")
#: Failure rate from which a compute element is listed as failing.
_FAILING_RATE = 0.2


async def _selected_vo(request: Request, context: AppContext) -> str | None:
    """VO selected by the request; None: all VOs, for users who may see them.

    Raises:
        NotFoundError: the user may not see this VO, or it is unknown.
    """
    wanted, own = request.query_params.get("vo") or None, request.state.principal.vo
    if own is not None and wanted not in (None, own):
        raise NotFoundError(f"{wanted!r:.40} is not your VO, which is {own!r}.")
    if wanted is not None and own is None and wanted not in await _known_vos(context):
        raise NotFoundError(f"There is no VO {wanted[:40]!r}.")
    return own or wanted


async def _known_vos(context: AppContext) -> set[str]:
    """VOs of the configuration, pilots and compute elements."""
    served = {vo for ce in await READ_MODELS.ces() for vo in ce["vos"] or ()}
    return {*(await context.settings()).vos, *await READ_MODELS.summary(None), *served}


async def _overview(request: Request, context: AppContext) -> dict[str, Any]:
    vo = await _selected_vo(request, context)
    query = request.query_params
    text, state = query.get("ce", "").strip(), query.get("state", "")
    if state not in ("", *_CE_STATES):
        raise NotFoundError(f"{state[:40]!r} is no state of a compute element.")
    summary = await READ_MODELS.summary(request.state.principal.vo)
    reports = await READ_MODELS.reports(request.state.principal.vo)
    statistics = await READ_MODELS.statistics(vo)
    visible = (logic.redact_ce(request.state.principal.vo, ce) for ce in await READ_MODELS.ces(vo))
    known = [_with_state(ce, statistics) for ce in visible]
    # Sorted by Python, not by the database: a page begins after the last name of the previous one.
    ces = sorted((ce for ce in known if _matches_filter(ce, text, state)), key=lambda ce: str(ce["name"]))
    of_state = {ce["name"] for ce in ces}
    rows = [
        (name, ce, states, reports.get(name, {}).get(ce, {}))
        for name, by_ce in summary.items()
        for ce, states in by_ce.items()
        if vo in (None, name) and text.lower() in ce.lower() and (not state or ce in of_state)
    ]
    shown = [ce for ce in ces if ce["name"] > query.get("after", "")][:_CES]
    first = _number(query.get("rows", "0"))
    bound = request.state.principal.vo is not None
    waiting = {} if bound else await READ_MODELS.waiting(tuple(ce["name"] for ce in shown))
    return {
        "vo": vo,
        "vos": sorted(summary),
        "bound": bound,
        "waiting": waiting,
        "chosen": {"ce": text, "state": state},
        "ce_states": _CE_STATES,
        "rows": rows[first : first + _ROWS],
        "all_rows": len(rows),
        "next_rows": first + _ROWS if len(rows) > first + _ROWS else None,
        "states": _STATES,
        "totals": {each: sum(states.get(each, 0) for _, _, states, _ in rows) for each in _STATES},
        "stale": sum(counts.get(_STALE, 0) for *_, counts in rows),
        "ces": shown,
        "all_ces": len(ces),
        "after": shown[-1]["name"] if shown and shown[-1] is not ces[-1] else None,
        "capacity": sum(ce["capacity"] for ce in ces),
        "active": sum(ce["active"] for ce in ces),
        "free": sum(ce["available_slots"] for ce in ces if ce["enabled"]),
        "closed": sum(not ce["enabled"] for ce in ces),
        "since": statistics.since,
        "hours": HOURS,
    }


def _with_state(ce: Mapping[str, Any], statistics: PilotStatistics) -> dict[str, Any]:
    rate = statistics.failure_rate(ce["name"])
    paused = any(circuit["state"] is not CircuitState.CLOSED for circuit in ce["circuits"].values())
    state = "open" if ce["enabled"] else "closed" if ce["banned_at"] is None else "banned"
    idle = statistics.idle_rate(ce["name"])
    return {**ce, "rate": rate, "idle": idle, "state": state, "failing": paused or (rate or 0) >= _FAILING_RATE}


def _matches_filter(ce: Mapping[str, Any], text: str, state: str) -> bool:
    in_state = state in ("", ce["state"]) or (state == "failing" and ce["failing"])
    return in_state and text.lower() in ce["name"].lower()


def _number(text: str, least: int = 0, most: int = 1_000_000) -> int:
    try:
        return integer(text, least, most)
    except NotPossibleError as error:
        raise NotFoundError(str(error)) from error


async def _charts(request: Request, context: AppContext) -> dict[str, Any]:
    return (await READ_MODELS.statistics(await _selected_vo(request, context))).charts


async def _list(request: Request, context: AppContext) -> dict[str, Any]:
    query = request.query_params
    status = query.get("status") or None
    if status is not None and status not in (*_STATES, _STALE):
        raise NotFoundError(f"{status[:40]!r} is no state of a pilot.")
    number = _number(query.get("page", "1"), 1)
    stamps: list[str] | None = None
    problem = ""
    if job := query.get("job", "").strip():
        try:
            stamps = await logic.stamps_of_job(READ_MODELS.registry, _number(job, 1, 2**63 - 1))
        except RegistryUnavailableError as error:
            stamps, problem = [], f"Cannot find the pilots of a job: {error.public}."
    total, pilots = await logic.search_pilots(
        READ_MODELS.database(),
        vo=await _selected_vo(request, context),
        ce_name=query.get("ce") or None,
        status=None if status in (None, _STALE) else MyPilotStatus(str(status)),
        stamps=stamps,
        stale=status == _STALE,
        page=number,
        per_page=_PAGE,
    )
    return {
        "pilots": pilots,
        "total": total,
        "number": number,
        "pages": -(-total // _PAGE),
        "chosen": {name: query.get(name, "") for name in ("vo", "ce", "status", "job")},
        "problem": problem,
        "states": [*_STATES, _STALE],
        "vos": sorted(await READ_MODELS.summary(request.state.principal.vo)),
        "ces": [ce["name"] for ce in await READ_MODELS.ces(request.state.principal.vo)],
    }


async def _pilot_details(request: Request, context: AppContext) -> dict[str, Any]:
    pilot = await _pilot(request)
    steps = pilot["history"]
    durations = [None, *((after["at"] - before["at"]).total_seconds() for before, after in pairwise(steps))]
    return {
        "pilot": pilot,
        "steps": list(zip(steps, durations, strict=True)),
        "active": pilot["status"] in ACTIVE,
        "jobs": await logic.jobs_of_pilot(READ_MODELS.registry, pilot),
    }


async def _pilot(request: Request) -> dict[str, Any]:
    """Get the pilot of the URL, if the user may see it."""
    try:
        number = integer(request.path_params["pilot"], 1)
        return await logic.get_pilot(READ_MODELS.database(), number, request.state.principal.vo)
    except (NotPossibleError, PilotNotFoundError) as error:
        raise NotFoundError(f"There is no pilot {request.path_params['pilot'][:40]!r}.") from error


async def _output(request: Request, context: AppContext) -> dict[str, Any]:
    pilot = await _pilot(request)
    output, problem = None, ""
    try:
        calls, user = await site_calls(), request.state.principal.name
        output = await calls.output(READ_MODELS.database(), pilot["pilot_id"], user=user)
    except OutputUnavailableError as error:
        problem = f"There is no output: {error.reason}."
    except (CEUnavailableError, SiteBusyError) as error:
        problem = f"The output cannot be fetched now: {error}."
    except PilotNotFoundError as error:  # it was pruned meanwhile
        raise NotFoundError(str(error)) from error
    return {"pilot": pilot, "output": output, "problem": problem, "most": _OUTPUT_CHARS}


PAGES = [
    Page("/pilots", "pilots", "Pilots", _overview, section="Pilots", charts=_charts, per_vo=True),
    Page("/pilots/list", "pilot_list", "List of pilots", _list, nav="/pilots", per_vo=True),
    Page("/pilots/{pilot}", "pilot", "Pilot", _pilot_details, nav="/pilots", per_vo=True),
    Page(
        "/pilots/{pilot}/output",
        "pilot_output",
        "Output of a pilot",
        _output,
        nav="/pilots",
        live=False,
        per_vo=True,
    ),
]
