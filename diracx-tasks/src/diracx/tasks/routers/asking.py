"""Whoever asks, or acts, by HTTP: what they may, and how they are answered."""

from __future__ import annotations

__all__ = ["Reader", "Writer", "there"]

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from diracx.routers.utils.users import AuthorizedUserInfo, verify_dirac_access_token
from fastapi import Depends, HTTPException
from fastapi.responses import JSONResponse
from redis.exceptions import RedisError

from ..dashboard.installation import Installation
from ..dashboard.operations import NotPossibleError, Operator
from ..monitor import as_json
from ..monitor.masking import masked_json
from ..plumbing.exceptions import SendTaskError
from ..plumbing.secrets import mask
from .access_policies import ActionType, CheckTasksPolicyCallable
from .environment import installation_of_environment
from .policies import ConfigReader
from .recording import name_of

_Answer = TypeVar("_Answer")

System = Annotated[Installation, Depends(installation_of_environment)]
User = Annotated[AuthorizedUserInfo, Depends(verify_dirac_access_token)]


class _Reader:
    """Somebody who may look."""

    def __init__(self, system: System, check: CheckTasksPolicyCallable, config: ConfigReader) -> None:
        self.system = system
        self._check = check
        self._config = config

    async def answer(self, ask: Callable[[], Awaitable[Any]]) -> JSONResponse:
        """What was asked for, as JSON without passwords."""
        await self._check(action=ActionType.READ, config=self._config)
        return JSONResponse(masked_json(as_json(await _asked(ask))))


class _Writer:
    """Somebody who may act."""

    def __init__(self, system: System, user: User, check: CheckTasksPolicyCallable, config: ConfigReader) -> None:
        self.operator = Operator(system, name_of(user), "api")
        self._check = check
        self._config = config

    async def answer(self, do: Callable[[], Awaitable[Any]]) -> JSONResponse:
        """What came of it, as JSON without passwords."""
        await self._check(action=ActionType.WRITE, config=self._config)
        return JSONResponse(masked_json(as_json(await _asked(do))))


Reader = Annotated[_Reader, Depends(_Reader)]
Writer = Annotated[_Writer, Depends(_Writer)]


async def _asked(ask: Callable[[], Awaitable[_Answer]]) -> _Answer:
    try:
        return await ask()
    except NotPossibleError as error:
        raise HTTPException(HTTPStatus.CONFLICT, mask(str(error))) from error
    except ValueError as error:
        raise HTTPException(HTTPStatus.NOT_FOUND, mask(str(error))) from error
    except SendTaskError as error:
        raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, mask(str(error))) from error
    except RedisError as error:
        raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, f"the broker does not answer: {error}") from error


def there(value: _Answer | None, what: str) -> _Answer:
    """The value, if there is one.

    Raises:
        HTTPException: 404, there is none.
    """
    if value is None:
        raise HTTPException(HTTPStatus.NOT_FOUND, f"there is no {what}")
    return value
