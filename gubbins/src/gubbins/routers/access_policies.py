"""Access policy of the pilot routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import StrEnum, auto
from typing import Annotated, Any

from diracx.core.config.schema import Config
from diracx.core.properties import GENERIC_PILOT, NORMAL_USER, OPERATOR
from diracx.routers.access_policies import BaseAccessPolicy
from diracx.routers.utils.users import AuthorizedUserInfo
from diracx.tasks.web.auth.policies import check_properties, forbidden
from fastapi import Depends


class ActionType(StrEnum):
    """Action of a request."""

    READ = auto()  # see pilots and compute elements
    SUBMIT = auto()  # submit or cancel pilots
    MANAGE = auto()  # create, open and close compute elements
    REPORT = auto()  # report as a pilot, about that pilot


_NEEDED: dict[ActionType, tuple[str, ...]] = {
    ActionType.READ: (NORMAL_USER, OPERATOR),
    ActionType.SUBMIT: (NORMAL_USER,),
    ActionType.MANAGE: (),
    ActionType.REPORT: (GENERIC_PILOT,),
}
PILOT_CLAIM = "my_pilots"
"""Key among the `dirac_policies` of a token, with the stamp of the pilot and the number of the exchange."""


class MyPilotsAccessPolicy(BaseAccessPolicy):
    """Members of a VO access its pilots; service administrators access all pilots and manage compute elements.

    * READ needs NormalUser, Operator or ServiceAdministrator; SUBMIT needs NormalUser or ServiceAdministrator;
      MANAGE needs ServiceAdministrator; REPORT needs the token of a pilot, which allows nothing else.
    * For pilots of another VO, routes respond as if they did not exist, except to service administrators.
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
        """Check the properties of the user (see `check_properties`) and the VO of the pilots.

        Args:
            vo: VO of the pilots; None: the VO of the token.
        """
        is_admin = await check_properties(user_info, action, _NEEDED, config)
        if action is ActionType.REPORT and (GENERIC_PILOT not in user_info.properties or not pilot_of(user_info)):
            raise forbidden("reports need a token of a pilot, got for its secret")
        if vo is not None and vo != user_info.vo and not is_admin:
            raise forbidden(f"these pilots belong to another VO than yours ({user_info.vo})")


def pilot_of(user: AuthorizedUserInfo) -> tuple[str, int] | None:
    """Stamp of the pilot of a token, and number of the exchange; None: not the token of a pilot."""
    match user.policies.get(PILOT_CLAIM):
        case {"stamp": str(stamp), "start": int(start)}:
            return stamp, start
    return None


CheckMyPilotsPolicyCallable = Annotated[Callable[..., Any], Depends(MyPilotsAccessPolicy.check)]
