"""Shared parts of access policies of DiracX, for those of extensions as well."""

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
    """A 403 that says why."""
    return HTTPException(status_code=HTTPStatus.FORBIDDEN, detail=detail)


async def check_properties(
    user_info: AuthorizedUserInfo,
    action: StrEnum | None,
    needed: Mapping[Any, Sequence[str]],
    config: Callable[[], Awaitable[Config]] | None,
) -> bool:
    """Check that the properties of a token allow an action, and that its VO is in the registry.

    DiracX checks a token's signature, not its contents. Service administrators may do everything.

    Args:
        needed: for each action the properties of which one is enough.

    Returns:
        Whether the user is a service administrator.

    Raises:
        HTTPException: 403, with the reason.
        ValueError: the route gave no action or no configuration.
    """
    if action is None or config is None:
        raise ValueError("the access policy needs `action` and `config`")
    if user_info.vo not in (await config()).registry:
        raise forbidden(f"VO {user_info.vo!r} is not in the registry of this installation")
    is_admin = SERVICE_ADMINISTRATOR in user_info.properties
    if not is_admin and not any(each in user_info.properties for each in needed[action]):
        wanted = " or ".join([*needed[action], SERVICE_ADMINISTRATOR])
        raise forbidden(f"this ({action}) needs the property {wanted}")
    return is_admin


def _config_reader(request: Request) -> Callable[[], Awaitable[Config]]:
    return request.app.dependency_overrides[ConfigSource.create]  # type: ignore[no-any-return]  # set by diracx


ConfigReader = Annotated[Callable[[], Awaitable[Config]], Depends(_config_reader)]
"""Reads the configuration when it is called: only the policy wants it, and one that an extension puts in its
place (or the tests of one, which have no configuration) may not."""
