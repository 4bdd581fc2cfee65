"""What routes may answer beside what was asked for, as OpenAPI has it; for those of extensions as well."""

from __future__ import annotations

__all__ = ["responses"]

from collections.abc import Mapping
from typing import Any

_MEANING = {
    401: "No token, or one that is not valid",
    403: "The token's VO or properties do not allow this",
    404: "There is nothing of that name or id",
    429: "You act too often; `Retry-After` says for how many seconds to wait",
    409: "Not possible as things are",
    503: "No broker is configured, or it does not answer",
}


def responses(*codes: int, meaning: Mapping[int, str] | None = None) -> dict[int | str, dict[str, Any]]:
    """Status codes with their meaning; those about tokens go without saying.

    Args:
        meaning: what they mean here, where that is something else than elsewhere.
    """
    meanings = {**_MEANING, **(meaning or {})}
    example = {"application/json": {"example": {"detail": "…"}}}
    return {code: {"description": meanings[code], "content": example} for code in (401, 403, *codes)}
