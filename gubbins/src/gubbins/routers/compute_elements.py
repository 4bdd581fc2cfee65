"""Routes of compute elements and their downtimes."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from fastapi import Body, Path, Query

from gubbins.domain.audit_actions import AuditAction
from gubbins.domain.downtimes import Downtime
from gubbins.logic import my_pilots as logic
from gubbins.logic.my_pilots import CESpec

from .access import Access, CEName, http_errors, route_responses, router
from .access_policies import ActionType
from .models import CEBan, CEPublic, NewDowntime


@router.get("/ces", responses=route_responses())
async def list_ces(
    access: Access,
    with_room: Annotated[bool, Query(description="Only the enabled ones with a free slot.")] = False,
) -> list[CEPublic]:
    """List the compute elements that serve your VO, with their free slots. Administrators see all."""
    await access.check(ActionType.READ)
    return [
        CEPublic.model_validate(logic.redact_ce(access.own_vo, ce))
        for ce in await logic.list_ces(access.db, access.own_vo)
        if not with_room or (ce["enabled"] and ce["available_slots"])
    ]


@router.get("/ces/{ce_name}", responses=route_responses(404))
async def get_ce(ce_name: CEName, access: Access) -> CEPublic:
    """Show one compute element with its circuits and all its rules. It has to serve your VO.

    The last error of the site, and rules of other VOs, are for administrators only.
    """
    await access.check(ActionType.READ)
    with http_errors(access.own_vo):
        return CEPublic.model_validate(await logic.get_ce(access.db, ce_name, access.own_vo))


@router.post("/ces", status_code=201, responses=route_responses(409, 503))
async def create_ce(
    spec: Annotated[CESpec, Body(description="The compute element to create.")], access: Access
) -> CEPublic:
    """Create a compute element. Needs ServiceAdministrator.

    Back ends that run commands on the workers' own hosts, or with their keys or credentials (`arc`, `local`,
    `slurm`, `ssh`), are refused here: `gubbins ce load`.
    """
    await access.check(ActionType.MANAGE)
    with http_errors(None):
        ce = await access.audit.perform(
            AuditAction.CREATE_CE,
            spec.name,
            lambda: logic.add_ce(access.db, spec, by_operator=False),
            lambda ce: f"{ce['backend']}, {ce['capacity']} slots",
        )
    return CEPublic.model_validate(ce)


@router.post("/ces/{ce_name}/enable", status_code=204, responses=route_responses(404, 503))
async def enable_ce(ce_name: CEName, access: Access) -> None:
    """Open a compute element for new pilots. Needs ServiceAdministrator.

    Lifts a ban, and closes its circuits.
    """
    await _set_enabled(access, ce_name, True)


@router.post("/ces/{ce_name}/disable", status_code=204, responses=route_responses(404, 503))
async def disable_ce(ce_name: CEName, access: Access) -> None:
    """Close a compute element for new pilots; active pilots continue. Needs ServiceAdministrator.

    Lifts a ban.
    """
    await _set_enabled(access, ce_name, False)


async def _set_enabled(access: Access, ce_name: str, enabled: bool) -> None:
    state = "open" if enabled else "closed"
    await access.check(ActionType.MANAGE)
    with http_errors(None):
        await access.audit.perform(
            AuditAction.OPEN_CE if enabled else AuditAction.CLOSE_CE,
            ce_name,
            lambda: logic.set_ce_enabled(access.db, ce_name, enabled),
            lambda changed: state if changed else f"was {state} already",
        )


@router.post("/ces/{ce_name}/ban", status_code=204, responses=route_responses(404, 503))
async def ban_ce(
    ce_name: CEName, access: Access, ban: Annotated[CEBan | None, Body(description="Why.")] = None
) -> None:
    """Ban a compute element. Needs ServiceAdministrator.

    There are no submissions and no polls until it is enabled or disabled.
    """
    await access.check(ActionType.MANAGE)
    reason = None if ban is None else ban.reason
    with http_errors(None):
        await access.audit.perform(
            AuditAction.BAN_CE,
            ce_name,
            lambda: logic.ban_ce(access.db, ce_name, reason=reason),
            lambda changed: ("banned" if changed else "was banned already") + (f": {reason}" if reason else ""),
        )


@router.get("/downtimes", responses=route_responses())
async def list_downtimes(access: Access) -> list[Downtime]:
    """List the present and future downtimes of the compute elements that serve your VO. Administrators see all."""
    await access.check(ActionType.READ)
    return await logic.list_downtimes(access.db, vo=access.own_vo)


@router.post("/ces/{ce_name}/downtimes", status_code=201, responses=route_responses(404, 503))
async def add_downtime(
    ce_name: CEName, downtime: Annotated[NewDowntime, Body(description="When and why.")], access: Access
) -> Downtime:
    """Plan a downtime of a compute element: no submissions and no alerts. Needs ServiceAdministrator."""
    await access.check(ActionType.MANAGE)
    with http_errors(None):
        return await access.audit.perform(
            AuditAction.ADD_DOWNTIME,
            ce_name,
            lambda: logic.add_downtime(
                access.db,
                ce_name,
                downtime.starts_at,
                downtime.ends_at,
                downtime.reason,
                by=access.user.preferred_username,
                drain=timedelta(seconds=downtime.drain_seconds),
            ),
            lambda added: f"{added.id}: {added.starts_at} to {added.ends_at}, {added.reason}",
        )


@router.delete("/downtimes/{downtime_id}", status_code=204, responses=route_responses(404, 503))
async def remove_downtime(
    downtime_id: Annotated[int, Path(description="Id of a downtime.", ge=1, le=2**63 - 1, examples=[7])],
    access: Access,
) -> None:
    """Remove a downtime; one that has started ends at once. Needs ServiceAdministrator."""
    await access.check(ActionType.MANAGE)
    with http_errors(None):
        await access.audit.perform(
            AuditAction.REMOVE_DOWNTIME,
            str(downtime_id),
            lambda: logic.remove_downtime(access.db, downtime_id),
            lambda removed: f"of {removed.ce_name}",
        )
