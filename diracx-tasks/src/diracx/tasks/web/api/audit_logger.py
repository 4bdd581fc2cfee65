"""Requests that do something are written to the audit log; for those of extensions as well."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated, TypeVar

from diracx.core.properties import SERVICE_ADMINISTRATOR
from diracx.routers.utils.users import AuthorizedUserInfo, verify_dirac_access_token
from fastapi import Depends, HTTPException
from redis.exceptions import RedisError

from ...operations.audit import audited
from ...plumbing.lock_registry import register_locked_object_type
from ...plumbing.locks import RateLimiter
from ..auth.diracx import name_of
from .environment import broker_url, context_of_environment

logger = logging.getLogger(__name__)

_Outcome = TypeVar("_Outcome")


_USER = register_locked_object_type("api_user")


class UserActionRate(RateLimiter):
    """Limit of the actions of one user by HTTP: what is refused neither fills the audit log nor reaches a site."""

    limit = 60
    window_seconds = 60.0


class AuditLogger:
    """Writes down what this request does: in the administrators' log, or in that of the user's VO.

    Routes check the request, and the access policy (which knows the VOs), before they come here.
    """

    def __init__(self, user: Annotated[AuthorizedUserInfo, Depends(verify_dirac_access_token)]) -> None:
        self._user = user
        self._who = name_of(user)
        self._is_admin = SERVICE_ADMINISTRATOR in user.properties

    async def perform(
        self,
        action: str,
        target: str,
        do: Callable[[], Awaitable[_Outcome]],
        summary: Callable[[_Outcome], str] = str,
    ) -> _Outcome:
        """Do something. Arguments as of `diracx.tasks.operations.audit.audited`.

        In an application that knows no server of tasks there is no audit log: the log of the application has it.

        Raises:
            HTTPException: 503, when it cannot be written down, and 429, when this user acts too often; it is not
                done then.
            Exception: whatever `do` raises.
        """
        if not broker_url():
            outcome = await do()
            logger.info("%s, %s, %s: %s", self._who, action, target, summary(outcome))
            return outcome
        try:
            redis = (await context_of_environment()).redis
            if not self._is_admin and not await UserActionRate(_USER, self._user.sub).acquire(redis):
                raise _too_often()
            vo = None if self._is_admin else self._user.vo
            return await audited(redis, self._who, "api", action, target, do, summary, vo=vo)
        except RedisError as error:
            raise HTTPException(
                HTTPStatus.SERVICE_UNAVAILABLE, f"the audit log cannot be written: {error}"
            ) from error


def _too_often() -> HTTPException:
    limit, seconds = UserActionRate.limit, UserActionRate.window_seconds
    return HTTPException(
        HTTPStatus.TOO_MANY_REQUESTS,
        f"more than {limit} actions in {seconds:.0f} s: try again after that time",
        {"Retry-After": f"{seconds:.0f}"},
    )


Audited = Annotated[AuditLogger, Depends(AuditLogger)]
