"""Router of `/api/my_pilots/`: access control, dependencies, and mapping of errors to HTTP status codes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any

from diracx.core.properties import SERVICE_ADMINISTRATOR
from diracx.db.sql import PilotAgentsDB
from diracx.routers.fastapi_classes import DiracxRouter
from diracx.routers.utils.users import AuthorizedUserInfo, verify_dirac_access_token
from diracx.tasks.web.api.audit_logger import Audited
from diracx.tasks.web.api.responses import BoundedRoute, responses, server_errors
from diracx.tasks.web.auth.policies import ConfigReader
from fastapi import Depends, HTTPException, Path, Request

from gubbins.db.sql import MyPilotDB
from gubbins.domain import exceptions
from gubbins.logic import my_pilots as logic
from gubbins.logic.my_pilots import CE_NAME
from gubbins.logic.my_pilots.site_calls import SiteCalls, site_calls

from .access_policies import ActionType, CheckMyPilotsPolicyCallable

# Pilots that exchange their secret have no token yet; `Access` requires one for all other routes.
router = DiracxRouter(dependencies=[Depends(server_errors)], require_auth=False)
router.route_class = BoundedRoute

CEName = Annotated[
    str,
    Path(description="Name of a compute element.", examples=["ce01.example.org"], max_length=128, pattern=CE_NAME),
]
PilotId = Annotated[int, Path(description="Id of a pilot.", ge=1, le=2**63 - 1, examples=[42])]

# The first match counts.
_ERRORS: dict[HTTPStatus, tuple[type[exceptions.GubbinsError], ...]] = {
    HTTPStatus.UNAUTHORIZED: (exceptions.IdentityRefusedError,),
    HTTPStatus.FORBIDDEN: (exceptions.VONotServedError,),
    HTTPStatus.NOT_FOUND: (
        exceptions.UnknownCEError,
        exceptions.PilotNotFoundError,
        exceptions.OutputUnavailableError,
        exceptions.DowntimeNotFoundError,
    ),
    HTTPStatus.UNPROCESSABLE_ENTITY: (exceptions.CESettingsError, exceptions.DowntimeError),
    HTTPStatus.BAD_GATEWAY: (exceptions.CERefusedError, exceptions.CEUnavailableError),
    HTTPStatus.SERVICE_UNAVAILABLE: (exceptions.RegistryUnavailableError,),
    HTTPStatus.CONFLICT: (exceptions.PilotSubmissionError, exceptions.CEExistsError, exceptions.PilotEndedError),
}
route_responses = partial(
    responses,
    meaning={
        409: "Conflict: no free slot, disabled, paused, ended or existing already",
        429: "Too many requests; `Retry-After` gives the time to wait",
        502: "The compute element refused, or did not respond",
        503: "The database or the audit log is unavailable; nothing was done",
    },
)


@contextlib.contextmanager
def http_errors(own_vo: str | None) -> Iterator[None]:
    """Convert errors of the logic layer to HTTP errors; only administrators (None) get the full message."""
    try:
        yield
    except exceptions.CESettingsError as error:
        detail = [
            {"loc": ["body", *path.split(".")], "msg": message, "type": "value_error"}
            for path, message in error.problems
        ]
        raise HTTPException(HTTPStatus.UNPROCESSABLE_ENTITY, detail) from error
    except exceptions.GubbinsError as error:
        message = str(error) if own_vo is None else error.public
        wait = getattr(error, "retry_after_seconds", None)
        if wait is not None:
            headers = {"Retry-After": str(wait)}
            raise HTTPException(HTTPStatus.TOO_MANY_REQUESTS, message, headers) from error
        found = (status for status, errors in _ERRORS.items() if isinstance(error, errors))
        raise HTTPException(next(found, HTTPStatus.BAD_REQUEST), message) from error


async def _pilot_registry(request: Request) -> AsyncIterator[PilotAgentsDB | None]:
    """The pilot registry of the application; None: not configured."""
    provide = PilotAgentsDB.no_transaction
    try:
        opened = contextlib.asynccontextmanager(request.app.dependency_overrides.get(provide, provide))()
    except NotImplementedError:  # raised by DiracX for a database that is not configured
        yield None
        return
    async with opened as registry:
        yield registry


class _Access:
    """Dependencies of routes: user, database, audit log, pilot registry and calls to sites.

    A request has no transaction of its own: the logic layer uses short ones, and none during calls to sites.
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
        """VO to which the request is limited; None: administrators."""
        self._check = partial(check_permissions, config=config)

    async def check(self, action: ActionType, vo: str | None = None) -> None:
        """Check the access policy for pilots of a VO; None: the VO of the token.

        Raises:
            HTTPException: 403 Forbidden.
        """
        await self._check(action=action, vo=vo)

    async def pilot(self, pilot_id: int, action: ActionType) -> dict[str, Any]:
        """Get a pilot that the user may see.

        Raises:
            PilotNotFoundError: there is no such pilot, or the policy forbids it; the user cannot distinguish both.
        """
        pilot = await logic.get_pilot(self.db, pilot_id, self.own_vo)
        try:
            await self.check(action, pilot["vo"])
        except HTTPException as error:
            raise exceptions.PilotNotFoundError(pilot_id) from error
        return pilot


Access = Annotated[_Access, Depends(_Access)]
