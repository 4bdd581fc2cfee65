"""Dependencies of the routes: access checks, visibility, responses and errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import wraps
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from diracx.core.settings import AuthSettings
from diracx.routers.utils.users import AuthorizedUserInfo, verify_dirac_access_token
from fastapi import Depends, HTTPException
from fastapi.responses import JSONResponse

from ...operations import as_json
from ...operations.masking import masked_json
from ...operations.visibility import Viewer
from ...plumbing._util.passwords import mask
from ...plumbing.broker.stored import UnreadableKeyError
from ...plumbing.exceptions import SendTaskError
from ..auth.access_policies import ActionType, CheckTasksPolicyCallable
from ..auth.diracx import name_of
from ..auth.policies import ConfigReader
from ..context import AppContext
from ..operator import NotPossibleError, Operator
from .environment import context_from_environment

_Value = TypeVar("_Value")

User = Annotated[AuthorizedUserInfo, Depends(verify_dirac_access_token)]
_Settings = Annotated[AuthSettings, Depends(AuthSettings.create)]


@dataclass(frozen=True)
class _Reader:
    """Context of a route that reads."""

    system: AppContext
    viewer: Viewer
    """Visibility of tasks for the user."""


async def _reader(
    user: User, check: CheckTasksPolicyCallable, config: ConfigReader, settings: _Settings
) -> _Reader:
    await check(action=ActionType.READ, config=config)
    viewer = Viewer(None)
    try:
        await check(action=ActionType.READ_ALL, config=config)
    except HTTPException:
        viewer = Viewer(user.vo, settings.state_key.get_secret_value())
    return _Reader(await context_from_environment(), viewer)


async def _all_vos_reader(check: CheckTasksPolicyCallable, config: ConfigReader) -> _Reader:
    await check(action=ActionType.READ_ALL, config=config)
    return _Reader(await context_from_environment(), Viewer(None))


async def _operator(user: User, check: CheckTasksPolicyCallable, config: ConfigReader) -> Operator:
    await check(action=ActionType.WRITE, config=config)
    return Operator(await context_from_environment(), name_of(user), "api")


Reader = Annotated[_Reader, Depends(_reader)]
"""For data of VOs, of which the route shows what `viewer` sees, and for numbers of the installation."""
AllVOsReader = Annotated[_Reader, Depends(_all_vos_reader)]
"""For data of no VO, whose existence other users must not learn either."""
Writer = Annotated[Operator, Depends(_operator)]


def json_endpoint(endpoint: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[JSONResponse]]:
    """Decorate a function to respond with its value as JSON, passwords masked, or with the status of its error."""

    @wraps(endpoint)
    async def respond(*args: Any, **kwargs: Any) -> JSONResponse:
        try:
            value = await endpoint(*args, **kwargs)
        except NotPossibleError as error:
            raise HTTPException(HTTPStatus.CONFLICT, mask(str(error))) from error
        except (SendTaskError, UnreadableKeyError) as error:
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, mask(str(error))) from error
        except ValueError as error:
            raise HTTPException(HTTPStatus.NOT_FOUND, mask(str(error))) from error
        return JSONResponse(masked_json(as_json(value)))

    return respond


def or_404(value: _Value | None, what: str) -> _Value:
    """Return the value; raise a 404 if it is None."""
    if value is None:
        raise HTTPException(HTTPStatus.NOT_FOUND, f"no {what}")
    return value
