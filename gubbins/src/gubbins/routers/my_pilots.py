"""Routes below `/api/my_pilots/`."""

from __future__ import annotations

__all__ = ["router"]

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any

from diracx.core.properties import SERVICE_ADMINISTRATOR
from diracx.routers.dependencies import NoTransaction
from diracx.routers.fastapi_classes import DiracxRouter
from diracx.routers.utils.users import AuthorizedUserInfo, verify_dirac_access_token
from diracx.tasks.web.api.audit_logger import Audited, AuditLogger
from diracx.tasks.web.api.responses import BoundedRoute, database_errors, responses
from diracx.tasks.web.auth.policies import ConfigReader
from fastapi import Body, Depends, HTTPException, Path, Query, Response

from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.domain.audit_actions import AuditAction
from gubbins.domain.exceptions import (
    CEDisabledError,
    CEExistsError,
    CEPausedError,
    CERefusedError,
    CESettingsError,
    CEUnavailableError,
    GubbinsError,
    NoRoomError,
    OutputUnavailableError,
    PilotEndedError,
    PilotNotFoundError,
    SubmissionLimitError,
    UnknownCEError,
    VONotServedError,
)
from gubbins.logic import my_pilots as logic
from gubbins.logic.my_pilots import CE_NAME, CESpec
from gubbins.logic.my_pilots.site_calls import SiteCalls, site_calls

from .access_policies import ActionType, CheckMyPilotsPolicyCallable
from .models import CEBan, CEPublic, Pilot, PilotOutputPublic, PilotPage, PilotWithHistory, Submission, Summary

router = DiracxRouter(dependencies=[Depends(database_errors)])
router.route_class = BoundedRoute

# Without a transaction around the request: the logic layer commits before the answer leaves, and holds
# nothing while a compute element is being talked to.
PilotDB = Annotated[MyPilotDB, NoTransaction()]
User = Annotated[AuthorizedUserInfo, Depends(verify_dirac_access_token)]
CEName = Annotated[
    str,
    Path(description="Name of a compute element.", examples=["ce01.example.org"], max_length=128, pattern=CE_NAME),
]
PilotId = Annotated[int, Path(description="Id of a pilot.", ge=1, le=2**63 - 1, examples=[42])]

_STATUS_OF: dict[type[GubbinsError], HTTPStatus] = {
    UnknownCEError: HTTPStatus.NOT_FOUND,
    PilotNotFoundError: HTTPStatus.NOT_FOUND,
    NoRoomError: HTTPStatus.CONFLICT,
    SubmissionLimitError: HTTPStatus.CONFLICT,
    CEDisabledError: HTTPStatus.CONFLICT,
    CEPausedError: HTTPStatus.CONFLICT,
    CEExistsError: HTTPStatus.CONFLICT,
    PilotEndedError: HTTPStatus.CONFLICT,
    VONotServedError: HTTPStatus.FORBIDDEN,
    CESettingsError: HTTPStatus.UNPROCESSABLE_ENTITY,
    CERefusedError: HTTPStatus.BAD_GATEWAY,
    CEUnavailableError: HTTPStatus.BAD_GATEWAY,
    OutputUnavailableError: HTTPStatus.NOT_FOUND,
}
_responses = partial(
    responses,
    meaning={
        409: "Not possible as things are: no room, disabled, paused, ended or existing already",
        429: "Too many; `Retry-After` says when to come back",
        502: "The compute element refused, or did not answer",
        503: "The database, or the audit log, cannot be used, and nothing was done",
    },
)


@contextlib.contextmanager
def _as_http(own_vo: str | None) -> Iterator[None]:
    """Turn errors of the logic layer into HTTP errors; the whole message is for administrators (None) only."""
    try:
        yield
    except CESettingsError as error:
        detail = [
            {"loc": ["body", *path.split(".")], "msg": message, "type": "value_error"}
            for path, message in error.problems
        ]
        raise HTTPException(HTTPStatus.UNPROCESSABLE_ENTITY, detail) from error
    except GubbinsError as error:
        message = str(error) if own_vo is None else error.public
        wait = getattr(error, "retry_after_seconds", None)
        if wait is not None:
            headers = {"Retry-After": str(wait)}
            raise HTTPException(HTTPStatus.TOO_MANY_REQUESTS, message, headers) from error
        raise HTTPException(_STATUS_OF.get(type(error), HTTPStatus.BAD_REQUEST), message) from error


def _own_vo(user: User) -> str | None:
    return None if SERVICE_ADMINISTRATOR in user.properties else user.vo


OwnVO = Annotated[str | None, Depends(_own_vo)]
"""The VO that the request is limited to; None: administrators, who see every VO."""


Calls = Annotated[SiteCalls, Depends(site_calls)]
"""Calls to sites, limited in number."""


async def _pilot(
    db: MyPilotDB, pilot_id: int, own_vo: str | None, check: Callable[..., Awaitable[None]]
) -> dict[str, Any]:
    """A pilot that the user may see.

    Raises:
        PilotNotFoundError: there is no such pilot, or the policy lets the user see none of its VO. Nothing tells
            which.
    """
    pilot = await logic.get_pilot(db, pilot_id, own_vo)
    try:
        await check(vo=pilot["vo"])
    except HTTPException as error:
        raise PilotNotFoundError(pilot_id) from error
    return pilot


@router.post("/submit/{ce_name}", responses=_responses(404, 409, 429, 502, 503))
async def submit_pilot(
    ce_name: CEName,
    my_pilot_db: PilotDB,
    config: ConfigReader,
    user: User,
    own_vo: OwnVO,
    check_permissions: CheckMyPilotsPolicyCallable,
    recorder: Audited,
    calls: Calls,
) -> Submission:
    """Submit one pilot of your VO to a compute element. It has to serve your VO."""
    await check_permissions(action=ActionType.SUBMIT, config=config, vo=user.vo)
    with _as_http(own_vo):
        try:
            pilot_id = await recorder.perform(
                AuditAction.SUBMIT_PILOT,
                ce_name,
                lambda: calls.submit(my_pilot_db, ce_name, user.vo, user=user.sub),
                lambda pilot_id: f"pilot {pilot_id} of {user.vo}",
            )
        except VONotServedError:
            if own_vo is None:
                raise
            raise UnknownCEError(ce_name) from None  # others must not find out which there are
    return Submission(pilot_id=pilot_id, ce_name=ce_name, vo=user.vo)


@router.get("/summary", responses=_responses())
async def get_summary(
    my_pilot_db: PilotDB,
    config: ConfigReader,
    own_vo: OwnVO,
    check_permissions: CheckMyPilotsPolicyCallable,
) -> Summary:
    """Count your VO's pilots by compute element and state. Service administrators see every VO."""
    await check_permissions(action=ActionType.READ, config=config)
    pilots = await logic.get_pilot_summary(my_pilot_db, own_vo)
    totals: dict[str, int] = {}
    for states in (states for ces in pilots.values() for states in ces.values()):
        for state, count in states.items():
            totals[state] = totals.get(state, 0) + count
    return Summary(pilots=pilots, totals=totals)


@router.get("/pilots", responses=_responses())
async def search_pilots(
    response: Response,
    my_pilot_db: PilotDB,
    config: ConfigReader,
    own_vo: OwnVO,
    check_permissions: CheckMyPilotsPolicyCallable,
    vo: Annotated[
        str | None, Query(description="Only this VO's; needs to be yours.", examples=["lhcb"], max_length=128)
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
    page: Annotated[int, Query(ge=1, le=10**9, description="Which page, from 1.")] = 1,
    per_page: Annotated[int, Query(ge=1, le=1_000, description="Pilots on a page.")] = 100,
) -> PilotPage:
    """List your VO's pilots, newest first, a page at a time. Service administrators see every VO.

    The header `Content-Range` says which of how many pilots the page holds.
    """
    await check_permissions(action=ActionType.READ, config=config, vo=vo)
    total, found = await logic.search_pilots(
        my_pilot_db,
        vo=vo if own_vo is None else own_vo,
        ce_name=ce_name,
        status=status,
        page=page,
        per_page=per_page,
    )
    first = (page - 1) * per_page
    shown = f"{first}-{first + len(found) - 1}" if found else "*"
    response.headers["Content-Range"] = f"pilots {shown}/{total}"
    items = [Pilot.model_validate(pilot) for pilot in found]
    return PilotPage(items=items, total=total, page=page, per_page=per_page)


@router.get("/pilots/{pilot_id}", responses=_responses(404))
async def get_pilot(
    pilot_id: PilotId,
    my_pilot_db: PilotDB,
    config: ConfigReader,
    own_vo: OwnVO,
    check_permissions: CheckMyPilotsPolicyCallable,
) -> PilotWithHistory:
    """Show one pilot with its history."""
    check = partial(check_permissions, action=ActionType.READ, config=config)
    await check()
    with _as_http(own_vo):
        pilot = await _pilot(my_pilot_db, pilot_id, own_vo, check)
    return PilotWithHistory.model_validate(pilot)


@router.get("/pilots/{pilot_id}/output", responses=_responses(404, 429, 502))
async def get_pilot_output(
    pilot_id: PilotId,
    my_pilot_db: PilotDB,
    config: ConfigReader,
    user: User,
    own_vo: OwnVO,
    check_permissions: CheckMyPilotsPolicyCallable,
    calls: Calls,
) -> PilotOutputPublic:
    """Show the output of a pilot of your VO: so far, or after its end for as long as it is kept."""
    check = partial(check_permissions, action=ActionType.READ, config=config)
    await check()
    with _as_http(own_vo):
        await _pilot(my_pilot_db, pilot_id, own_vo, check)
        output = await calls.output(my_pilot_db, pilot_id, user=user.sub)
    return PilotOutputPublic.model_validate(output)


@router.post("/pilots/{pilot_id}/cancel", status_code=202, responses=_responses(404, 409, 503))
async def cancel_pilot(
    pilot_id: PilotId,
    my_pilot_db: PilotDB,
    config: ConfigReader,
    user: User,
    own_vo: OwnVO,
    check_permissions: CheckMyPilotsPolicyCallable,
    recorder: Audited,
    calls: Calls,
) -> Pilot:
    """Cancel a pilot of your VO.

    The pilot is FAILED once its compute element has confirmed that it ended, which the next checks find out.
    """
    check = partial(check_permissions, action=ActionType.SUBMIT, config=config)
    await check()
    with _as_http(own_vo):
        await _pilot(my_pilot_db, pilot_id, own_vo, check)
        pilot = await recorder.perform(
            AuditAction.CANCEL_PILOT,
            str(pilot_id),
            lambda: calls.cancel(my_pilot_db, pilot_id, by=user.preferred_username, user=user.sub),
            lambda pilot: f"requested at {pilot['ce_name']}",
        )
    return Pilot.model_validate(pilot)


@router.get("/ces", responses=_responses())
async def list_ces(
    my_pilot_db: PilotDB,
    config: ConfigReader,
    own_vo: OwnVO,
    check_permissions: CheckMyPilotsPolicyCallable,
    with_room: Annotated[bool, Query(description="Only the enabled ones with a free slot.")] = False,
) -> list[CEPublic]:
    """List the compute elements that serve your VO, with their free slots. Administrators see all."""
    await check_permissions(action=ActionType.READ, config=config)
    return [
        CEPublic.model_validate(logic.as_seen_by(own_vo, ce))
        for ce in await logic.list_ces(my_pilot_db, own_vo)
        if not with_room or (ce["enabled"] and ce["available_slots"])
    ]


@router.get("/ces/{ce_name}", responses=_responses(404))
async def get_ce(
    ce_name: CEName,
    my_pilot_db: PilotDB,
    config: ConfigReader,
    own_vo: OwnVO,
    check_permissions: CheckMyPilotsPolicyCallable,
) -> CEPublic:
    """Show one compute element with its circuits and all its rules. It has to serve your VO.

    The last error of the site, and rules of other VOs, are for administrators only.
    """
    await check_permissions(action=ActionType.READ, config=config)
    with _as_http(own_vo):
        return CEPublic.model_validate(await logic.get_ce(my_pilot_db, ce_name, own_vo))


@router.post("/ces", status_code=201, responses=_responses(409, 503))
async def create_ce(
    spec: Annotated[CESpec, Body(description="The compute element to create.")],
    my_pilot_db: PilotDB,
    config: ConfigReader,
    check_permissions: CheckMyPilotsPolicyCallable,
    recorder: Audited,
) -> CEPublic:
    """Create a compute element. Needs ServiceAdministrator.

    Back ends that run commands on the workers' own hosts, or with their keys or credentials (`arc`, `local`,
    `slurm`, `ssh`), are refused here: `gubbins ce load`.
    """
    await check_permissions(action=ActionType.MANAGE, config=config)
    with _as_http(None):
        ce = await recorder.perform(
            AuditAction.CREATE_CE,
            spec.name,
            lambda: logic.add_ce(my_pilot_db, spec, by_operator=False),
            lambda ce: f"{ce['backend']}, {ce['capacity']} slots",
        )
    return CEPublic.model_validate({**ce, "active": 0, "available_slots": ce["capacity"]})


@router.post("/ces/{ce_name}/enable", status_code=204, responses=_responses(404, 503))
async def enable_ce(
    ce_name: CEName,
    my_pilot_db: PilotDB,
    config: ConfigReader,
    check_permissions: CheckMyPilotsPolicyCallable,
    recorder: Audited,
) -> None:
    """Open a compute element for new pilots. Needs ServiceAdministrator.

    Lifts a ban, and ends the pause of one that failed too often.
    """
    await check_permissions(action=ActionType.MANAGE, config=config)
    await _set_enabled(my_pilot_db, recorder, ce_name, True)


@router.post("/ces/{ce_name}/disable", status_code=204, responses=_responses(404, 503))
async def disable_ce(
    ce_name: CEName,
    my_pilot_db: PilotDB,
    config: ConfigReader,
    check_permissions: CheckMyPilotsPolicyCallable,
    recorder: Audited,
) -> None:
    """Close a compute element for new pilots; those it has go on and are followed. Needs ServiceAdministrator.

    Lifts a ban.
    """
    await check_permissions(action=ActionType.MANAGE, config=config)
    await _set_enabled(my_pilot_db, recorder, ce_name, False)


async def _set_enabled(my_pilot_db: MyPilotDB, recorder: AuditLogger, ce_name: str, enabled: bool) -> None:
    state = "open" if enabled else "closed"
    with _as_http(None):
        await recorder.perform(
            AuditAction.OPEN_CE if enabled else AuditAction.CLOSE_CE,
            ce_name,
            lambda: logic.set_ce_enabled(my_pilot_db, ce_name, enabled),
            lambda changed: state if changed else f"was {state} already",
        )


@router.post("/ces/{ce_name}/ban", status_code=204, responses=_responses(404, 503))
async def ban_ce(
    ce_name: CEName,
    my_pilot_db: PilotDB,
    config: ConfigReader,
    check_permissions: CheckMyPilotsPolicyCallable,
    recorder: Audited,
    ban: Annotated[CEBan | None, Body(description="Why.")] = None,
) -> None:
    """Ban a compute element. Needs ServiceAdministrator.

    It gets no pilots, and those it has are not polled until it is enabled or disabled again.
    """
    await check_permissions(action=ActionType.MANAGE, config=config)
    reason = None if ban is None else ban.reason
    with _as_http(None):
        await recorder.perform(
            AuditAction.BAN_CE,
            ce_name,
            lambda: logic.ban_ce(my_pilot_db, ce_name, reason=reason),
            lambda changed: ("banned" if changed else "was banned already") + (f": {reason}" if reason else ""),
        )
