"""Access policy of the task system."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import StrEnum, auto
from typing import Annotated, Any

from diracx.core.config.schema import Config
from diracx.core.properties import OPERATOR
from diracx.routers.access_policies import BaseAccessPolicy
from diracx.routers.utils.users import AuthorizedUserInfo
from fastapi import Depends

from .policies import check_properties


class ActionType(StrEnum):
    """Action of a request."""

    READ = auto()  # read numbers of the installation, and tasks of the user's VO
    READ_ALL = auto()  # read tasks of all VOs, and data of no VO
    WRITE = auto()  # cancel, purge, release, pause, retry, discard, for all VOs


_NEEDED: dict[ActionType, tuple[str, ...]] = {
    ActionType.READ: (OPERATOR,),
    ActionType.READ_ALL: (),
    ActionType.WRITE: (),
}


class TasksAccessPolicy(BaseAccessPolicy):
    """READ needs the property Operator or ServiceAdministrator; READ_ALL and WRITE need ServiceAdministrator."""

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
        """Check an action. `policy_name` is the name of its entry point. See `check_properties`."""
        await check_properties(user_info, action, _NEEDED, config)


CheckTasksPolicyCallable = Annotated[Callable[..., Any], Depends(TasksAccessPolicy.check)]
