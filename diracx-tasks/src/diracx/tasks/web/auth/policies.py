"""What access policies of DiracX share, for those of extensions as well."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated

from diracx.core.config import ConfigSource
from diracx.core.config.schema import Config
from fastapi import Depends, HTTPException, Request


def forbidden(detail: str) -> HTTPException:
    """A 403 that says why."""
    return HTTPException(status_code=HTTPStatus.FORBIDDEN, detail=detail)


async def check_vo_is_registered(vo: str, config: Callable[[], Awaitable[Config]]) -> None:
    """DiracX checks a token's signature, not whether its VO is still known.

    Raises:
        HTTPException: 403, when the registry lacks the VO.
    """
    if vo not in (await config()).registry:
        raise forbidden(f"VO {vo!r} is not in the registry of this installation")


def _config_reader(request: Request) -> Callable[[], Awaitable[Config]]:
    return request.app.dependency_overrides[ConfigSource.create]  # type: ignore[no-any-return]  # set by diracx


ConfigReader = Annotated[Callable[[], Awaitable[Config]], Depends(_config_reader)]
"""Reads the configuration when it is called: only the policy wants it, and one that an extension puts in its
place (or the tests of one, which have no configuration) may not."""
