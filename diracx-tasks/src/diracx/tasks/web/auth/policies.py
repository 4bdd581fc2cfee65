"""Shared parts of access policies of DiracX, also for extensions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import StrEnum
from http import HTTPStatus
from typing import Annotated, Any

from diracx.core.config import ConfigSource
from diracx.core.config.schema import Config
from diracx.core.properties import SERVICE_ADMINISTRATOR
from diracx.routers.utils.users import AuthorizedUserInfo
from fastapi import Depends, HTTPException, Request


def forbidden(detail: str) -> HTTPException:
    """Make a 403 with a reason."""
    return HTTPException(status_code=HTTPStatus.FORBIDDEN, detail=detail)


async def check_properties(
    user_info: AuthorizedUserInfo,
    action: StrEnum | None,
    needed: Mapping[Any, Sequence[str]],
    config: Callable[[], Awaitable[Config]] | None,
) -> bool:
    """Check that the properties of a token allow an action, and that its VO is in the registry.

    DiracX checks the signature of a token, not its contents. Service administrators may perform every action.

    Args:
        needed: sufficient properties of each action.

    Returns:
        Whether the user is a service administrator.

    Raises:
        HTTPException: 403, with the reason.
        ValueError: the route passed no action or no configuration.
    """
    if action is None or config is None:
        raise ValueError("the access policy needs `action` and `config`")
    if user_info.vo not in (await config()).registry:
        raise forbidden(f"VO {user_info.vo!r} is not in the registry of this installation")
    is_admin = SERVICE_ADMINISTRATOR in user_info.properties
    if not is_admin and not any(each in user_info.properties for each in needed[action]):
        properties = " or ".join([*needed[action], SERVICE_ADMINISTRATOR])
        raise forbidden(f"this ({action}) needs the property {properties}")
    return is_admin


async def _config_reader(request: Request) -> Callable[[], Awaitable[Config]]:
    return request.app.dependency_overrides[ConfigSource.create]  # type: ignore[no-any-return]  # set by diracx


ConfigReader = Annotated[Callable[[], Awaitable[Config]], Depends(_config_reader)]
"""Reads the configuration lazily, as only some access policies need it."""
