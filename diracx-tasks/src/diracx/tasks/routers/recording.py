"""Requests that do something are written to the audit log; for those of extensions as well."""

from __future__ import annotations

__all__ = ["Recorded", "Recorder", "name_of"]

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated, TypeVar

from diracx.routers.utils.users import AuthorizedUserInfo, verify_dirac_access_token
from fastapi import Depends, HTTPException
from redis.exceptions import RedisError

from ..monitor.audit import audited
from ..plumbing.broker.connection import redis_url_from_environment
from .environment import installation_of_environment

logger = logging.getLogger(__name__)

_Outcome = TypeVar("_Outcome")


def name_of(user: AuthorizedUserInfo) -> str:
    """Somebody's name for the audit log: no two have the same."""
    return f"{user.preferred_username} ({user.sub})"


class Recorder:
    """Writes down what this request does."""

    def __init__(self, user: Annotated[AuthorizedUserInfo, Depends(verify_dirac_access_token)]) -> None:
        self._who = name_of(user)

    async def perform(
        self,
        action: str,
        target: str,
        do: Callable[[], Awaitable[_Outcome]],
        told: Callable[[_Outcome], str] = str,
    ) -> _Outcome:
        """Do something. Arguments as of `diracx.tasks.monitor.audit.audited`.

        In an application that knows no server of tasks there is no audit log: the log of the application has it.

        Raises:
            HTTPException: 503, when it cannot be written down; it is not done then.
            Exception: whatever `do` raises.
        """
        if not redis_url_from_environment():
            outcome = await do()
            logger.info("%s, %s, %s: %s", self._who, action, target, told(outcome))
            return outcome
        try:
            redis = (await installation_of_environment()).redis
            return await audited(redis, self._who, "api", action, target, do, told)
        except RedisError as error:
            raise HTTPException(
                HTTPStatus.SERVICE_UNAVAILABLE, f"the audit log cannot be written: {error}"
            ) from error


Recorded = Annotated[Recorder, Depends(Recorder)]
