"""Routes for pilots: exchange of secrets for tokens, and reports."""

from __future__ import annotations

import contextlib
import uuid
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Annotated

from diracx.core.models import AccessTokenPayload
from diracx.core.properties import GENERIC_PILOT
from diracx.core.settings import AuthSettings
from diracx.logic.auth.token import create_token
from diracx.routers.access_policies import open_access
from diracx.routers.utils.users import AuthorizedUserInfo
from diracx.tasks.web.api.audit_logger import AuditLogger
from diracx.tasks.web.auth.policies import ConfigReader
from fastapi import Depends, HTTPException, Request, Response

from gubbins.db.sql import MyPilotDB
from gubbins.domain.audit_actions import AuditAction
from gubbins.domain.exceptions import IdentityMisusedError
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.domain.text import one_line
from gubbins.logic import my_pilots as logic
from gubbins.logic.my_pilots.request_rate import PilotRates, pilot_rates

from .access import Access, http_errors, route_responses, router
from .access_policies import PILOT_CLAIM, ActionType, pilot_of
from .models import PilotReport, PilotReported, PilotToken, PilotTokenRequest

Rates = Annotated[PilotRates, Depends(pilot_rates)]


@router.post("/token", responses=route_responses(429, 503))
@open_access  # type: ignore[untyped-decorator]  # diracx has no types there
async def get_pilot_token(
    credentials: PilotTokenRequest,
    request: Request,
    response: Response,
    db: Annotated[MyPilotDB, Depends(MyPilotDB.no_transaction)],
    config: ConfigReader,
    rates: Rates,
    settings: AuthSettings,
) -> PilotToken:
    """Exchange the secret of a pilot, or its refresh token, for a token with the property GenericPilot.

    Needs no token. Secrets and refresh tokens can be used once. Pilots that have ended or are being cancelled get
    no token.
    """
    address = None if request.client is None else request.client.host
    response.headers["Cache-Control"] = "no-store"
    with http_errors(""):
        rates.address.admit(str(address))
        # With the address, so that others who know the stamp cannot use up the limit.
        rates.pilot.admit(f"{address} {credentials.stamp}")
        vos = (await config()).registry  # first: a response without a new token must not use up the old one
        stamp, secret = credentials.stamp, credentials.secret
        try:
            if secret is not None:
                grant = await logic.exchange_secret(db, stamp, secret, vos=vos, address=address)
            else:
                grant = await logic.refresh_token(db, stamp, str(credentials.refresh_token), vos=vos)
        except IdentityMisusedError as error:
            await _record_misuse(error, credentials)
            raise
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


async def _record_misuse(error: IdentityMisusedError, credentials: PilotTokenRequest) -> None:
    """Write the reuse of a secret or refresh token to the audit log of the VO."""
    presenter = AuthorizedUserInfo.model_validate(
        {
            "bearer_token": "",
            "token_id": uuid.uuid4(),
            "properties": [GENERIC_PILOT],
            "sub": f"{error.vo}:pilot:{credentials.stamp}",
            "preferred_username": f"pilot {credentials.stamp}",
            "dirac_group": "pilot",
            "vo": error.vo,
        }
    )

    async def refuse() -> None:
        raise error

    action = AuditAction.REFRESH_TOKEN if credentials.secret is None else AuditAction.EXCHANGE_SECRET
    with contextlib.suppress(IdentityMisusedError):
        await AuditLogger(presenter).perform(action, str(error.pilot_id), refuse)


@router.post("/report", responses=route_responses(429, 503))
async def report(content: PilotReport, access: Access, rates: Rates) -> PilotReported:
    """Report as a pilot: its host, a heartbeat (an empty report), or its outcome.

    Needs the token of the pilot. A SUBMITTED pilot becomes RUNNING; its end is reported by its compute element
    only.
    """
    await access.check(ActionType.REPORT)
    pilot = pilot_of(access.user)
    if pilot is None:
        raise HTTPException(HTTPStatus.FORBIDDEN, "not a token of a pilot")
    stamp, start = pilot
    reported = content.model_dump(exclude_none=True)
    for name in {"host", "detail"} & reported.keys():
        reported[name] = one_line(reported[name], 200)
    with http_errors(""):
        rates.pilot.admit(stamp)
        heartbeat_seconds = await logic.record_report(access.db, stamp, access.user.vo, start, reported)
    return PilotReported(status=MyPilotStatus.RUNNING, heartbeat_seconds=heartbeat_seconds)
