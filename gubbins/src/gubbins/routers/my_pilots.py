"""Routes below `/api/my_pilots/`."""

from __future__ import annotations

import contextlib
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any

from diracx.core.models import AccessTokenPayload
from diracx.core.properties import GENERIC_PILOT, SERVICE_ADMINISTRATOR
from diracx.core.settings import AuthSettings
from diracx.db.sql import PilotAgentsDB
from diracx.logic.auth.token import create_token
from diracx.routers.access_policies import open_access
from diracx.routers.fastapi_classes import DiracxRouter
from diracx.routers.utils.users import AuthorizedUserInfo, verify_dirac_access_token
from diracx.tasks.web.api.audit_logger import Audited, AuditLogger
from diracx.tasks.web.api.responses import BoundedRoute, database_errors, responses
from diracx.tasks.web.auth.policies import ConfigReader
from fastapi import Body, Depends, HTTPException, Path, Query, Request, Response

from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.domain.audit_actions import AuditAction
from gubbins.domain.exceptions import (
    CEDisabledError,
    CEExistsError,
    CEPausedError,
    CEQuotaError,
    CERefusedError,
    CESettingsError,
    CEUnavailableError,
    DowntimeError,
    DowntimeNotFoundError,
    GubbinsError,
    IdentityMisusedError,
    IdentityRefusedError,
    NoRoomError,
    OutputUnavailableError,
    PilotEndedError,
    PilotNotFoundError,
    RegistryUnavailableError,
    SubmissionLimitError,
    UnknownCEError,
    VONotServedError,
)
from gubbins.domain.text import one_line
from gubbins.logic import my_pilots as logic
from gubbins.logic.my_pilots import CE_NAME, CESpec
from gubbins.logic.my_pilots.request_rate import PilotRates, pilot_rates
from gubbins.logic.my_pilots.site_calls import SiteCalls, site_calls

from .access_policies import PILOT_CLAIM, ActionType, CheckMyPilotsPolicyCallable, pilot_of
from .models import (
    CEBan,
    CEPublic,
    DowntimePublic,
    NewDowntime,
    Pilot,
    PilotOutputPublic,
    PilotPage,
    PilotReport,
    PilotReported,
    PilotToken,
    PilotTokenRequest,
    PilotWithHistory,
    Submission,
    Summary,
)

# Pilots that exchange their secret have no token yet; `Access` demands one of all others.
router = DiracxRouter(dependencies=[Depends(database_errors)], require_auth=False)
router.route_class = BoundedRoute

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
    CEQuotaError: HTTPStatus.CONFLICT,
    CEExistsError: HTTPStatus.CONFLICT,
    PilotEndedError: HTTPStatus.CONFLICT,
    VONotServedError: HTTPStatus.FORBIDDEN,
    CESettingsError: HTTPStatus.UNPROCESSABLE_ENTITY,
    CERefusedError: HTTPStatus.BAD_GATEWAY,
    CEUnavailableError: HTTPStatus.BAD_GATEWAY,
    OutputUnavailableError: HTTPStatus.NOT_FOUND,
    DowntimeNotFoundError: HTTPStatus.NOT_FOUND,
    DowntimeError: HTTPStatus.UNPROCESSABLE_ENTITY,
    RegistryUnavailableError: HTTPStatus.SERVICE_UNAVAILABLE,
    IdentityRefusedError: HTTPStatus.UNAUTHORIZED,
    IdentityMisusedError: HTTPStatus.UNAUTHORIZED,
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


async def _pilot_registry(request: Request) -> AsyncIterator[PilotAgentsDB | None]:
    """The pilot registry of the application; None: it has none, and these routes do without."""
    provide = PilotAgentsDB.no_transaction
    try:
        opened = contextlib.asynccontextmanager(request.app.dependency_overrides.get(provide, provide))()
    except NotImplementedError:  # so says what stands for a database that is not there
        yield None
        return
    async with opened as registry:
        yield registry


class _Access:
    """Dependencies of routes: the user of the request, the database, the audit log and the compute elements.

    There is no transaction around a request: the logic layer commits before the answer leaves, and holds nothing
    while a compute element is being talked to.
    """

    def __init__(
        self,
        db: Annotated[MyPilotDB, Depends(MyPilotDB.no_transaction)],
        config: ConfigReader,
        user: Annotated[AuthorizedUserInfo, Depends(verify_dirac_access_token)],
        check_permissions: CheckMyPilotsPolicyCallable,
        audit: Audited,
        calls: Annotated[SiteCalls, Depends(site_calls)],
        registry: Annotated[PilotAgentsDB | None, Depends(_pilot_registry)],
    ) -> None:
        self.db = db
        self.user = user
        self.audit = audit
        self.calls = calls
        self.registry = registry
        self.own_vo = None if SERVICE_ADMINISTRATOR in user.properties else user.vo
        """The VO that the request is limited to; None: administrators, who see every VO."""
        self._check = partial(check_permissions, config=config)

    async def check(self, action: ActionType, vo: str | None = None) -> None:
        """Ask the access policy.

        Args:
            vo: whose pilots are concerned; None: those of the token's VO.

        Raises:
            HTTPException: 403, it refuses.
        """
        await self._check(action=action, vo=vo)

    async def pilot(self, pilot_id: int, action: ActionType) -> dict[str, Any]:
        """A pilot that the user may see.

        Raises:
            PilotNotFoundError: there is no such pilot, or the policy lets the user see none of its VO. Nothing
                tells which.
        """
        pilot = await logic.get_pilot(self.db, pilot_id, self.own_vo)
        try:
            await self.check(action, pilot["vo"])
        except HTTPException as error:
            raise PilotNotFoundError(pilot_id) from error
        return pilot


Access = Annotated[_Access, Depends(_Access)]


@router.post("/submit/{ce_name}", responses=_responses(404, 409, 429, 502, 503))
async def submit_pilot(ce_name: CEName, access: Access) -> Submission:
    """Submit one pilot of your VO to a compute element. It has to serve your VO."""
    db, user = access.db, access.user
    await access.check(ActionType.SUBMIT, user.vo)
    with _as_http(access.own_vo):
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
            raise UnknownCEError(ce_name) from None  # others must not find out which there are
    return Submission(pilot_id=pilot_id, ce_name=ce_name, vo=user.vo)


@router.get("/summary", responses=_responses())
async def get_summary(access: Access) -> Summary:
    """Count your VO's pilots by compute element and state. Service administrators see every VO."""
    await access.check(ActionType.READ)
    pilots = await logic.count_pilots(access.db, access.own_vo)
    totals: Counter[str] = Counter()
    for states in (states for ces in pilots.values() for states in ces.values()):
        totals.update(states)
    reports = await logic.count_reports(access.db, access.own_vo)
    return Summary(pilots=pilots, totals=totals, reports=reports, **totals)


@router.get("/pilots", responses=_responses(503))
async def search_pilots(
    response: Response,
    access: Access,
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
    job_id: Annotated[
        int | None,
        Query(description="Only those on which this job ran, as the pilot registry has it.", ge=1, le=2**63 - 1),
    ] = None,
    stale: Annotated[bool, Query(description="Only running ones whose heartbeats have stopped.")] = False,
    page: Annotated[int, Query(ge=1, le=10**9, description="Which page, from 1.")] = 1,
    per_page: Annotated[int, Query(ge=1, le=1_000, description="Pilots on a page.")] = 100,
) -> PilotPage:
    """List your VO's pilots, newest first, a page at a time. Service administrators see every VO.

    The header `Content-Range` says which of how many pilots the page holds.
    """
    await access.check(ActionType.READ, vo)
    of_vo = vo if access.own_vo is None else access.own_vo
    with _as_http(access.own_vo):
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


@router.get("/pilots/{pilot_id}", responses=_responses(404))
async def get_pilot(pilot_id: PilotId, access: Access) -> PilotWithHistory:
    """Show one pilot with its history, and the jobs that ran on it."""
    await access.check(ActionType.READ)
    with _as_http(access.own_vo):
        pilot = await access.pilot(pilot_id, ActionType.READ)
    jobs = await logic.jobs_of_pilot(access.registry, pilot)
    return PilotWithHistory.model_validate({**pilot, "jobs": jobs})


@router.get("/pilots/{pilot_id}/output", responses=_responses(404, 429, 502))
async def get_pilot_output(pilot_id: PilotId, access: Access) -> PilotOutputPublic:
    """Show the output of a pilot of your VO: so far, or after its end for as long as it is kept."""
    await access.check(ActionType.READ)
    with _as_http(access.own_vo):
        await access.pilot(pilot_id, ActionType.READ)
        output = await access.calls.output(access.db, pilot_id, user=access.user.sub)
    return PilotOutputPublic.model_validate(output)


@router.post("/pilots/{pilot_id}/cancel", status_code=202, responses=_responses(404, 409, 503))
async def cancel_pilot(pilot_id: PilotId, access: Access) -> Pilot:
    """Cancel a pilot of your VO.

    The pilot is FAILED once its compute element has confirmed that it ended, which the next checks find out.
    """
    user = access.user
    await access.check(ActionType.SUBMIT)
    with _as_http(access.own_vo):
        await access.pilot(pilot_id, ActionType.SUBMIT)
        pilot = await access.audit.perform(
            AuditAction.CANCEL_PILOT,
            str(pilot_id),
            lambda: access.calls.cancel(access.db, pilot_id, by=user.preferred_username, user=user.sub),
            lambda pilot: f"requested at {pilot['ce_name']}",
        )
    return Pilot.model_validate(pilot)


@router.get("/ces", responses=_responses())
async def list_ces(
    access: Access,
    with_room: Annotated[bool, Query(description="Only the enabled ones with a free slot.")] = False,
) -> list[CEPublic]:
    """List the compute elements that serve your VO, with their free slots. Administrators see all."""
    await access.check(ActionType.READ)
    return [
        CEPublic.model_validate(logic.as_seen_by(access.own_vo, ce))
        for ce in await logic.list_ces(access.db, access.own_vo)
        if not with_room or (ce["enabled"] and ce["available_slots"])
    ]


@router.get("/ces/{ce_name}", responses=_responses(404))
async def get_ce(ce_name: CEName, access: Access) -> CEPublic:
    """Show one compute element with its circuits and all its rules. It has to serve your VO.

    The last error of the site, and rules of other VOs, are for administrators only.
    """
    await access.check(ActionType.READ)
    with _as_http(access.own_vo):
        return CEPublic.model_validate(await logic.get_ce(access.db, ce_name, access.own_vo))


@router.post("/ces", status_code=201, responses=_responses(409, 503))
async def create_ce(
    spec: Annotated[CESpec, Body(description="The compute element to create.")], access: Access
) -> CEPublic:
    """Create a compute element. Needs ServiceAdministrator.

    Back ends that run commands on the workers' own hosts, or with their keys or credentials (`arc`, `local`,
    `slurm`, `ssh`), are refused here: `gubbins ce load`.
    """
    await access.check(ActionType.MANAGE)
    with _as_http(None):
        ce = await access.audit.perform(
            AuditAction.CREATE_CE,
            spec.name,
            lambda: logic.add_ce(access.db, spec, by_operator=False),
            lambda ce: f"{ce['backend']}, {ce['capacity']} slots",
        )
    return CEPublic.model_validate({**ce, "active": 0, "available_slots": ce["capacity"]})


@router.post("/ces/{ce_name}/enable", status_code=204, responses=_responses(404, 503))
async def enable_ce(ce_name: CEName, access: Access) -> None:
    """Open a compute element for new pilots. Needs ServiceAdministrator.

    Lifts a ban, and ends the pause of one that failed too often.
    """
    await _set_enabled(access, ce_name, True)


@router.post("/ces/{ce_name}/disable", status_code=204, responses=_responses(404, 503))
async def disable_ce(ce_name: CEName, access: Access) -> None:
    """Close a compute element for new pilots; those it has go on and are followed. Needs ServiceAdministrator.

    Lifts a ban.
    """
    await _set_enabled(access, ce_name, False)


async def _set_enabled(access: _Access, ce_name: str, enabled: bool) -> None:
    state = "open" if enabled else "closed"
    await access.check(ActionType.MANAGE)
    with _as_http(None):
        await access.audit.perform(
            AuditAction.OPEN_CE if enabled else AuditAction.CLOSE_CE,
            ce_name,
            lambda: logic.set_ce_enabled(access.db, ce_name, enabled),
            lambda changed: state if changed else f"was {state} already",
        )


@router.post("/ces/{ce_name}/ban", status_code=204, responses=_responses(404, 503))
async def ban_ce(
    ce_name: CEName, access: Access, ban: Annotated[CEBan | None, Body(description="Why.")] = None
) -> None:
    """Ban a compute element. Needs ServiceAdministrator.

    It gets no pilots, and those it has are not polled until it is enabled or disabled again.
    """
    await access.check(ActionType.MANAGE)
    reason = None if ban is None else ban.reason
    with _as_http(None):
        await access.audit.perform(
            AuditAction.BAN_CE,
            ce_name,
            lambda: logic.ban_ce(access.db, ce_name, reason=reason),
            lambda changed: ("banned" if changed else "was banned already") + (f": {reason}" if reason else ""),
        )


@router.get("/downtimes", responses=_responses())
async def list_downtimes(access: Access) -> list[DowntimePublic]:
    """List the downtimes, planned or begun, of the compute elements that serve your VO. Administrators see all."""
    await access.check(ActionType.READ)
    found = await logic.list_downtimes(access.db, vo=access.own_vo)
    return [DowntimePublic.model_validate(each) for each in found]


@router.post("/ces/{ce_name}/downtimes", status_code=201, responses=_responses(404, 503))
async def add_downtime(
    ce_name: CEName, downtime: Annotated[NewDowntime, Body(description="When and why.")], access: Access
) -> DowntimePublic:
    """Plan a downtime of a compute element: no submissions and no alarms. Needs ServiceAdministrator."""
    await access.check(ActionType.MANAGE)
    with _as_http(None):
        added = await access.audit.perform(
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
    return DowntimePublic.model_validate(added)


@router.delete("/downtimes/{downtime_id}", status_code=204, responses=_responses(404, 503))
async def remove_downtime(
    downtime_id: Annotated[int, Path(description="Id of a downtime.", ge=1, le=2**63 - 1, examples=[7])],
    access: Access,
) -> None:
    """Remove a downtime; one that has begun ends at once. Needs ServiceAdministrator."""
    await access.check(ActionType.MANAGE)
    with _as_http(None):
        await access.audit.perform(
            AuditAction.REMOVE_DOWNTIME,
            str(downtime_id),
            lambda: logic.remove_downtime(access.db, downtime_id),
            lambda removed: f"of {removed.ce_name}",
        )


Rates = Annotated[PilotRates, Depends(pilot_rates)]


@router.post("/token", responses=_responses(429, 503))
@open_access  # type: ignore[untyped-decorator]  # diracx has no types there
async def get_pilot_token(
    asked: PilotTokenRequest,
    request: Request,
    response: Response,
    db: Annotated[MyPilotDB, Depends(MyPilotDB.no_transaction)],
    config: ConfigReader,
    rates: Rates,
    settings: AuthSettings,
) -> PilotToken:
    """Exchange the secret of a pilot, or its refresh token, for a token with the property GenericPilot.

    For pilots, which need no token for it. A secret is exchanged once, a refresh token is good for one use. One
    that has ended or is being cancelled gets none.
    """
    address = None if request.client is None else request.client.host
    response.headers["Cache-Control"] = "no-store"
    with _as_http(""):
        rates.address.admit(str(address))
        # By address as well: others may know the stamp, and must not keep the pilot out.
        rates.pilot.admit(f"{address} {asked.stamp}")
        try:
            if asked.secret is not None:
                grant = await logic.exchange_secret(db, asked.stamp, asked.secret, address=address)
            else:
                grant = await logic.refresh_token(db, asked.stamp, str(asked.refresh_token))
        except IdentityMisusedError as error:
            await _record_misuse(error, asked, config)
            raise
        if grant.vo not in (await config()).registry:
            raise IdentityRefusedError(f"VO {grant.vo!r} is not in the registry of this installation")
    expires = timedelta(minutes=settings.access_token_expire_minutes)
    payload = AccessTokenPayload(
        sub=f"{grant.vo}:pilot:{grant.stamp}",
        vo=grant.vo,
        iss=settings.token_issuer,
        dirac_properties=[GENERIC_PILOT],
        jti=str(uuid.uuid4()),
        preferred_username=f"pilot {grant.stamp}",
        dirac_group="pilot",
        exp=datetime.now(tz=UTC) + expires,
        dirac_policies={PILOT_CLAIM: {"stamp": grant.stamp, "start": grant.start}},
    )
    return PilotToken(
        access_token=create_token(payload, settings),
        expires_in=round(expires.total_seconds()),
        refresh_token=grant.refresh_token,
        heartbeat_seconds=grant.heartbeat_seconds,
    )


async def _record_misuse(error: IdentityMisusedError, asked: PilotTokenRequest, config: ConfigReader) -> None:
    """Write to the audit log of the VO that a secret or a refresh token was presented again."""
    if error.vo not in (await config()).registry:
        return
    presenter = AuthorizedUserInfo.model_validate(
        {
            "bearer_token": "",
            "token_id": uuid.uuid4(),
            "properties": [GENERIC_PILOT],
            "sub": f"{error.vo}:pilot:{asked.stamp}",
            "preferred_username": f"pilot {asked.stamp}",
            "dirac_group": "pilot",
            "vo": error.vo,
        }
    )

    async def refuse() -> None:
        raise error

    action = AuditAction.REFRESH_TOKEN if asked.secret is None else AuditAction.EXCHANGE_SECRET
    with contextlib.suppress(IdentityMisusedError):
        await AuditLogger(presenter).perform(action, str(error.pilot_id), refuse)


@router.post("/report", responses=_responses(429, 503))
async def report(said: PilotReport, access: Access, rates: Rates) -> PilotReported:
    """Report as a pilot: where it runs, that it is alive (an empty report), or why it ends.

    Needs the token of the pilot, which can report about no other. A SUBMITTED pilot is RUNNING then; its end is
    what its compute element says.
    """
    await access.check(ActionType.REPORT)
    pilot = pilot_of(access.user)
    if pilot is None:
        raise HTTPException(HTTPStatus.FORBIDDEN, "this is no token of a pilot")
    stamp, start = pilot
    reported = said.model_dump(exclude_none=True)
    for name in {"host", "detail"} & reported.keys():
        reported[name] = one_line(reported[name], 200)
    with _as_http(""):
        rates.pilot.admit(stamp)
        told = await logic.record_report(access.db, stamp, access.user.vo, start, reported)
    return PilotReported(status=told.status, heartbeat_seconds=told.heartbeat_seconds)
