"""Access policy of the pilot routes (P63)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import StrEnum, auto
from typing import Annotated, Any

from diracx.core.config.schema import Config
from diracx.core.properties import NORMAL_USER, OPERATOR, SERVICE_ADMINISTRATOR
from diracx.routers.access_policies import BaseAccessPolicy
from diracx.routers.utils.users import AuthorizedUserInfo
from diracx.tasks.web.auth.policies import check_vo_is_registered, forbidden
from fastapi import Depends


class ActionType(StrEnum):
    """Action of a request."""

    READ = auto()  # see pilots and compute elements
    SUBMIT = auto()  # submit or cancel pilots
    MANAGE = auto()  # create, open and close compute elements


class MyPilotsAccessPolicy(BaseAccessPolicy):
    """A VO sees and touches its own pilots; management is for service administrators.

    * The token's VO must be in the registry. DiracX checks a token's signature, not its contents.
    * READ needs NormalUser, Operator or ServiceAdministrator; SUBMIT needs NormalUser or ServiceAdministrator;
      MANAGE needs ServiceAdministrator.
    * Pilots of another VO are for service administrators only. Routes answer as if they did not exist.
    """

    @staticmethod
    async def policy(
        policy_name: str,
        user_info: AuthorizedUserInfo,
        /,
        *,
        action: ActionType | None = None,
        config: Callable[[], Awaitable[Config]] | None = None,
        vo: str | None = None,
        **_: Any,
    ) -> None:
        """Allow or refuse.

        Args:
            policy_name: the name it is registered under.
            user_info: what the token says.
            action: what is wanted.
            config: reads the configuration, for its registry of VOs.
            vo: whose pilots are concerned; None: those of the token's VO.

        Raises:
            HTTPException: 403, with the reason.
            ValueError: the route gave no action or no configuration.
        """
        if action is None or config is None:
            raise ValueError("MyPilotsAccessPolicy needs `action` and `config`")
        await check_vo_is_registered(user_info.vo, config)
        is_admin = SERVICE_ADMINISTRATOR in user_info.properties
        if action is ActionType.MANAGE and not is_admin:
            raise forbidden("managing compute elements needs the property ServiceAdministrator")
        needed = (NORMAL_USER, OPERATOR) if action is ActionType.READ else (NORMAL_USER,)
        if not is_admin and not any(each in user_info.properties for each in needed):
            raise forbidden(f"this needs the property {' or '.join(needed)} or ServiceAdministrator")
        if vo is not None and vo != user_info.vo and not is_admin:
            raise forbidden(f"these pilots belong to another VO than yours ({user_info.vo})")


CheckMyPilotsPolicyCallable = Annotated[Callable[..., Any], Depends(MyPilotsAccessPolicy.check)]
