"""Text that every database takes. A letter that SQL refuses for its spelling would never be stored."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .schema import LONGEST_NAME

_LONGEST_DETAIL = 10_000
#: Characters of all attempts of a letter; servers refuse statements of 16 MB.
_LONGEST_ATTEMPTS = 4_000_000


def storable(text: str, longest: int = _LONGEST_DETAIL) -> str:
    """The text without what PostgreSQL (NUL) or any encoding (half of a surrogate pair) refuses."""
    clean = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
    return clean if len(clean) <= longest else clean[:longest] + "…"


def fitting(name: str) -> str:
    """A name that fits its column; one that is too long ends in its hash, so that two of them stay two."""
    clean = storable(name, longest=10**9)
    if len(clean) <= LONGEST_NAME:
        return clean
    digest = hashlib.sha256(clean.encode()).hexdigest()
    return f"{clean[: LONGEST_NAME - len(digest) - 1]}~{digest}"


def attempts_as_text(attempts: Any) -> str:
    """Attempts as JSON, in ASCII. Those of a strange message may be anything.

    When they are too long, the oldest lose their tracebacks first, and go then.
    """
    from pydantic_core import to_jsonable_python

    kept = [
        to_jsonable_python(attempt, fallback=repr, bytes_mode="base64", inf_nan_mode="strings")
        if isinstance(attempt, dict)
        else {"message": repr(attempt)}
        for attempt in (attempts if isinstance(attempts, list | tuple) else [attempts])
    ]
    lengths = [len(json.dumps(attempt)) for attempt in kept]
    total = sum(lengths)
    for position, attempt in enumerate(kept):
        if total <= _LONGEST_ATTEMPTS:
            break
        shorter = {**attempt, "traceback": ""}
        total -= lengths[position] - (length := len(json.dumps(shorter)))
        kept[position], lengths[position] = shorter, length
    first = 0
    while total > _LONGEST_ATTEMPTS and first < len(kept):
        total -= lengths[first]
        first += 1
    return json.dumps(kept[first:])
