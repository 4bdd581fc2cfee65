"""Writes actions of HTTP requests to the audit log; used by routes of extensions, too."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated, TypeVar

from diracx.core.properties import SERVICE_ADMINISTRATOR
from diracx.routers.utils.users import AuthorizedUserInfo, verify_dirac_access_token
from fastapi import Depends, HTTPException
from redis.exceptions import RedisError

from ...operations.audit import AuditLog
from ...plumbing.lock_registry import register_locked_object_type
from ...plumbing.locks import RateLimiter
from ..auth.diracx import name_of
from .environment import broker_url, context_from_environment
from .responses import BROKER_AWAY

logger = logging.getLogger(__name__)

_Outcome = TypeVar("_Outcome")


API_USER = register_locked_object_type("api_user")


class UserActionRate(RateLimiter):
    """Rate limit of the actions of one user by HTTP, which protects audit log and sites."""

    limit = 60
    window_seconds = 60.0


class AuditLogger:
    """Writes actions of a request to the audit log: that of administrators, or that of the user's VO.

    Routes must check the request and the access policy, which validates the VO, before.
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
        """Perform an action. Arguments as of `diracx.tasks.operations.audit.AuditLog.perform`.

        An application without a configured broker writes it to its own log.

        Raises:
            HTTPException: 503 if the audit log cannot be written, 429 if the user exceeds the rate limit; then the
                action is not performed. 503 if `do` raises a RedisError.
            Exception: any other, raised by `do`.
        """
        if not broker_url():
            outcome = await do()
            logger.info("%s, %s, %s: %s", self._who, action, target, summary(outcome))
            return outcome
        problem = "the audit log cannot be written"

        async def begin() -> _Outcome:
            nonlocal problem
            problem = "the action failed"
            return await do()

        try:
            redis = (await context_from_environment()).redis
            if not self._is_admin and not await UserActionRate(API_USER, self._user.sub).acquire(redis):
                limit, seconds = UserActionRate.limit, f"{UserActionRate.window_seconds:.0f}"
                detail = f"more than {limit} actions in {seconds} s: try again after that time"
                raise HTTPException(HTTPStatus.TOO_MANY_REQUESTS, detail, {"Retry-After": seconds})
            vo = None if self._is_admin else self._user.vo
            return await AuditLog(redis, self._who, "api", vo).perform(action, target, begin, summary)
        except RedisError as error:
            logger.warning("%s: %s", problem, error)
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, f"{problem}: {BROKER_AWAY}") from error


Audited = Annotated[AuditLogger, Depends(AuditLogger)]
