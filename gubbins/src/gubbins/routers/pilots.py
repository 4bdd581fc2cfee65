"""Routes of pilots."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from fastapi import Query, Response

from gubbins.db.sql import MyPilotStatus
from gubbins.domain.audit_actions import AuditAction
from gubbins.domain.exceptions import UnknownCEError, VONotServedError
from gubbins.logic import my_pilots as logic
from gubbins.logic.my_pilots import CE_NAME

from .access import Access, CEName, PilotId, http_errors, route_responses, router
from .access_policies import ActionType
from .models import Pilot, PilotOutputPublic, PilotPage, PilotWithHistory, Submission, Summary


@router.post("/submit/{ce_name}", responses=route_responses(404, 409, 429, 502, 503))
async def submit_pilot(ce_name: CEName, access: Access) -> Submission:
    """Submit one pilot of your VO to a compute element. It has to serve your VO."""
    db, user = access.db, access.user
    await access.check(ActionType.SUBMIT, user.vo)
    with http_errors(access.own_vo):
        try:
            pilot_id = await access.audit.perform(
                AuditAction.SUBMIT_PILOT,
                ce_name,
                lambda: access.calls.submit(db, ce_name, user.vo, user=user.sub),
                lambda pilot_id: f"pilot {pilot_id} of {user.vo}",
            )
        except VONotServedError:
            if access.own_vo is None:
                raise
            raise UnknownCEError(ce_name) from None  # existing names are not disclosed
    return Submission(pilot_id=pilot_id, ce_name=ce_name, vo=user.vo)


@router.get("/summary", responses=route_responses())
async def get_summary(access: Access) -> Summary:
    """Count your VO's pilots by compute element and state. Service administrators see every VO."""
    await access.check(ActionType.READ)
    pilots = await logic.count_pilots(access.db, access.own_vo)
    totals: Counter[str] = Counter()
    for states in (states for ces in pilots.values() for states in ces.values()):
        totals.update(states)
    reports = await logic.count_reports(access.db, access.own_vo)
    return Summary(pilots=pilots, totals=totals, reports=reports, **totals)


@router.get("/pilots", responses=route_responses(503))
async def search_pilots(
    response: Response,
    access: Access,
    vo: Annotated[
        str | None, Query(description="Only this VO; has to be yours.", examples=["lhcb"], max_length=128)
    ] = None,
    ce_name: Annotated[
        str | None,
        Query(
            description="Only at this compute element.",
            examples=["ce01.example.org"],
            max_length=128,
            pattern=CE_NAME,
        ),
    ] = None,
    status: Annotated[MyPilotStatus | None, Query(description="Only in this state.")] = None,
    job_id: Annotated[
        int | None,
        Query(description="Only pilots on which this job ran, by the pilot registry.", ge=1, le=2**63 - 1),
    ] = None,
    stale: Annotated[bool, Query(description="Only running pilots whose heartbeats have stopped.")] = False,
    page: Annotated[int, Query(ge=1, le=10**9, description="Number of the page, from 1.")] = 1,
    per_page: Annotated[int, Query(ge=1, le=1_000, description="Pilots on a page.")] = 100,
) -> PilotPage:
    """List your VO's pilots, newest first, a page at a time. Service administrators see every VO.

    The header `Content-Range` has the range of the page and the total.
    """
    await access.check(ActionType.READ, vo)
    of_vo = vo if access.own_vo is None else access.own_vo
    with http_errors(access.own_vo):
        stamps = None if job_id is None else await logic.stamps_of_job(access.registry, job_id)
    total, found = await logic.search_pilots(
        access.db,
        vo=of_vo,
        ce_name=ce_name,
        status=status,
        stamps=stamps,
        stale=stale,
        page=page,
        per_page=per_page,
    )
    first = (page - 1) * per_page
    shown = f"{first}-{first + len(found) - 1}" if found else "*"
    response.headers["Content-Range"] = f"pilots {shown}/{total}"
    items = [Pilot.model_validate(pilot) for pilot in found]
    return PilotPage(items=items, total=total, page=page, per_page=per_page)


@router.get("/pilots/{pilot_id}", responses=route_responses(404))
async def get_pilot(pilot_id: PilotId, access: Access) -> PilotWithHistory:
    """Show one pilot with its history, and the jobs that ran on it."""
    await access.check(ActionType.READ)
    with http_errors(access.own_vo):
        pilot = await access.pilot(pilot_id, ActionType.READ)
    jobs = await logic.jobs_of_pilot(access.registry, pilot)
    return PilotWithHistory.model_validate({**pilot, "jobs": jobs})


@router.get("/pilots/{pilot_id}/output", responses=route_responses(404, 429, 502))
async def get_pilot_output(pilot_id: PilotId, access: Access) -> PilotOutputPublic:
    """Show the output of a pilot of your VO: the stored one, or that so far."""
    await access.check(ActionType.READ)
    with http_errors(access.own_vo):
        await access.pilot(pilot_id, ActionType.READ)
        output = await access.calls.output(access.db, pilot_id, user=access.user.sub)
    return PilotOutputPublic.model_validate(output)


@router.post("/pilots/{pilot_id}/cancel", status_code=202, responses=route_responses(404, 409, 503))
async def cancel_pilot(pilot_id: PilotId, access: Access) -> Pilot:
    """Cancel a pilot of your VO. It becomes FAILED when its compute element has confirmed the end."""
    user = access.user
    await access.check(ActionType.SUBMIT)
    with http_errors(access.own_vo):
        await access.pilot(pilot_id, ActionType.SUBMIT)
        pilot = await access.audit.perform(
            AuditAction.CANCEL_PILOT,
            str(pilot_id),
            lambda: access.calls.cancel(access.db, pilot_id, by=user.preferred_username, user=user.sub),
            lambda pilot: f"requested at {pilot['ce_name']}",
        )
    return Pilot.model_validate(pilot)
