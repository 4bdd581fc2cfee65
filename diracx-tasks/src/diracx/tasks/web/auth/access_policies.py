"""Access policy of the task system: who may look, and who may act."""

from __future__ import annotations

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

    READ = auto()  # look at the numbers of the installation, and at the tasks of one's own VO
    READ_ALL = auto()  # look at the tasks of all VOs, and at what belongs to no VO
    WRITE = auto()  # cancel, purge, release, pause, retry, discard: of all VOs


class TasksAccessPolicy(BaseAccessPolicy):
    """An operator sees the tasks of the own VO; a service administrator sees, and acts on, those of all.

    * The token's VO must be in the registry. DiracX checks a token's signature, not its contents.
    * READ needs Operator or ServiceAdministrator, READ_ALL and WRITE need ServiceAdministrator.
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
        if action is ActionType.READ_ALL and not is_admin:
            raise forbidden("this is about all VOs: looking at it needs the property ServiceAdministrator")
        if not is_admin and OPERATOR not in user_info.properties:
            raise forbidden("looking at tasks needs the property Operator or ServiceAdministrator")


CheckTasksPolicyCallable = Annotated[Callable[..., Any], Depends(TasksAccessPolicy.check)]
