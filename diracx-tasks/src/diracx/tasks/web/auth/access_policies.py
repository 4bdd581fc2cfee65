"""Access policy of the task system: who may look, and who may act."""

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

    READ = auto()  # look at the numbers of the installation, and at the tasks of one's own VO
    READ_ALL = auto()  # look at the tasks of all VOs, and at what belongs to no VO
    WRITE = auto()  # cancel, purge, release, pause, retry, discard: of all VOs


_NEEDED: dict[ActionType, tuple[str, ...]] = {
    ActionType.READ: (OPERATOR,),
    ActionType.READ_ALL: (),
    ActionType.WRITE: (),
}


class TasksAccessPolicy(BaseAccessPolicy):
    """An operator sees the tasks of the own VO; a service administrator sees, and acts on, those of all.

    READ needs Operator or ServiceAdministrator, READ_ALL and WRITE need ServiceAdministrator.
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
        """Allow or refuse; `policy_name` is the name it is registered under. See `check_properties`."""
        await check_properties(user_info, action, _NEEDED, config)


CheckTasksPolicyCallable = Annotated[Callable[..., Any], Depends(TasksAccessPolicy.check)]
