"""Who may look at the task system of an installation, and who may act on it."""

from __future__ import annotations

__all__ = ["ActionType", "CheckTasksPolicyCallable", "TasksAccessPolicy"]

from collections.abc import Awaitable, Callable
from enum import StrEnum, auto
from typing import Annotated, Any

from diracx.core.config.schema import Config
from diracx.core.properties import OPERATOR, SERVICE_ADMINISTRATOR
from diracx.routers.access_policies import BaseAccessPolicy
from diracx.routers.utils.users import AuthorizedUserInfo
from fastapi import Depends

from .policies import check_vo_is_registered, forbidden


class ActionType(StrEnum):
    """What a request wants to do."""

    READ = auto()  # look at queues, tasks and their arguments, of all VOs
    WRITE = auto()  # cancel, purge, release, pause, retry, discard


class TasksAccessPolicy(BaseAccessPolicy):
    """Tasks of all VOs share their queues, so there is no view of one VO alone.

    * The token's VO must be in the registry. DiracX checks a token's signature, not its contents.
    * READ needs Operator or ServiceAdministrator, WRITE needs ServiceAdministrator.
    """

    @staticmethod
    async def policy(
        policy_name: str,
        user_info: AuthorizedUserInfo,
        /,
        *,
        action: ActionType | None = None,
        config: Callable[[], Awaitable[Config]] | None = None,
        **_: Any,
    ) -> None:
        """Allow or refuse.

        Args:
            policy_name: the name it is registered under.
            user_info: what the token says.
            action: what is wanted.
            config: reads the configuration, for its registry of VOs.

        Raises:
            HTTPException: 403, with the reason.
            ValueError: the route gave no action or no configuration.
        """
        if action is None or config is None:
            raise ValueError("TasksAccessPolicy needs `action` and `config`")
        await check_vo_is_registered(user_info.vo, config)
        is_admin = SERVICE_ADMINISTRATOR in user_info.properties
        if action is ActionType.WRITE and not is_admin:
            raise forbidden("acting on tasks needs the property ServiceAdministrator")
        if not is_admin and OPERATOR not in user_info.properties:
            raise forbidden("looking at tasks needs the property Operator or ServiceAdministrator")


CheckTasksPolicyCallable = Annotated[Callable[..., Any], Depends(TasksAccessPolicy.check)]
