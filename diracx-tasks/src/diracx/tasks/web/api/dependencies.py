"""Dependencies of the routes: who may look or act, what of it, and how the answer is made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import wraps
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from diracx.routers.utils.users import AuthorizedUserInfo, verify_dirac_access_token
from fastapi import Depends, HTTPException
from fastapi.responses import JSONResponse
from redis.exceptions import RedisError

from ...operations import as_json
from ...operations.masking import masked_json
from ...operations.visibility import Viewer
from ...plumbing._util.passwords import mask
from ...plumbing.exceptions import SendTaskError
from ..auth.access_policies import ActionType, CheckTasksPolicyCallable
from ..auth.diracx import name_of
from ..auth.policies import ConfigReader
from ..context import AppContext
from ..operator import NotPossibleError, Operator
from .environment import context_of_environment

_Answer = TypeVar("_Answer")

User = Annotated[AuthorizedUserInfo, Depends(verify_dirac_access_token)]


@dataclass(frozen=True)
class _Reader:
    """A user who may look."""

    system: AppContext
    viewer: Viewer
    """Visibility of what belongs to a VO for the user."""


@dataclass(frozen=True)
class _Writer:
    """A user who may act."""

    operator: Operator


async def _reader(user: User, check: CheckTasksPolicyCallable, config: ConfigReader) -> _Reader:
    await check(action=ActionType.READ, config=config)
    try:
        await check(action=ActionType.READ_ALL, config=config)
    except HTTPException:
        viewer = Viewer(user.vo)
    else:
        viewer = Viewer(None)
    return _Reader(await context_of_environment(), viewer)


async def _all_vos_reader(check: CheckTasksPolicyCallable, config: ConfigReader) -> _Reader:
    await check(action=ActionType.READ_ALL, config=config)
    return _Reader(await context_of_environment(), Viewer(None))


async def _writer(user: User, check: CheckTasksPolicyCallable, config: ConfigReader) -> _Writer:
    await check(action=ActionType.WRITE, config=config)
    return _Writer(Operator(await context_of_environment(), name_of(user), "api"))


# The policy is asked before anything of the request is looked at, or opened.
Reader = Annotated[_Reader, Depends(_reader)]
"""For what belongs to VOs (the route shows what `viewer` sees), and for numbers of the installation."""
AllVOsReader = Annotated[_Reader, Depends(_all_vos_reader)]
"""For what belongs to no VO: others do not learn either whether it exists."""
Writer = Annotated[_Writer, Depends(_writer)]


def answered(endpoint: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[JSONResponse]]:
    """Answer with what a function returns, as JSON without passwords, or with the status that its error means."""

    @wraps(endpoint)
    async def answer(*args: Any, **kwargs: Any) -> JSONResponse:
        try:
            value = await endpoint(*args, **kwargs)
        except NotPossibleError as error:
            raise HTTPException(HTTPStatus.CONFLICT, mask(str(error))) from error
        except ValueError as error:
            raise HTTPException(HTTPStatus.NOT_FOUND, mask(str(error))) from error
        except SendTaskError as error:
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, mask(str(error))) from error
        except RedisError as error:
            said = f"the broker does not answer: {error}"
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, said) from error
        return JSONResponse(masked_json(as_json(value)))

    return answer


def or_404(value: _Answer | None, what: str) -> _Answer:
    """The value, if there is one.

    Raises:
        HTTPException: 404, there is none.
    """
    if value is None:
        raise HTTPException(HTTPStatus.NOT_FOUND, f"there is no {what}")
    return value
