"""Access policy of the pilot routes (P63)."""

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
"""Name of this policy among the `dirac_policies` of a token: which pilot it is, and which of its starts."""


class MyPilotsAccessPolicy(BaseAccessPolicy):
    """A VO sees and touches its own pilots; management is for service administrators.

    * READ needs NormalUser, Operator or ServiceAdministrator; SUBMIT needs NormalUser or ServiceAdministrator;
      MANAGE needs ServiceAdministrator; REPORT the token of a pilot, which allows nothing else.
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
        """Allow or refuse. See `check_properties`.

        Args:
            policy_name: the name it is registered under.
            vo: whose pilots are concerned; None: those of the token's VO.
        """
        is_admin = await check_properties(user_info, action, _NEEDED, config)
        if action is ActionType.REPORT and (GENERIC_PILOT not in user_info.properties or not pilot_of(user_info)):
            raise forbidden("only the token that a pilot got for its secret reports")
        if vo is not None and vo != user_info.vo and not is_admin:
            raise forbidden(f"these pilots belong to another VO than yours ({user_info.vo})")


def pilot_of(user: AuthorizedUserInfo) -> tuple[str, int] | None:
    """The stamp of the pilot whose token this is, and which start of it; None: it is no pilot's."""
    match user.policies.get(PILOT_CLAIM):
        case {"stamp": str(stamp), "start": int(start)}:
            return stamp, start
    return None


CheckMyPilotsPolicyCallable = Annotated[Callable[..., Any], Depends(MyPilotsAccessPolicy.check)]
