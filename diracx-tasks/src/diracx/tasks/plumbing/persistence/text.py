"""Encodes failed attempts of dead letters as text for all databases."""

from __future__ import annotations

import json
from typing import Any

#: Maximum length of all attempts of a dead letter, and of its history; servers refuse statements of 16 MB.
_LONGEST_ATTEMPTS = 4_000_000


def attempts_as_text(attempts: Any) -> str:
    """Encode attempts, which may be of any type in an invalid message, as JSON in ASCII.

    If they are too long, the tracebacks of the oldest are removed first, then the oldest attempts.
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


def history_as_text(failures: list[dict[str, Any]]) -> str:
    """Encode earlier failures as JSON. If they are too long, the attempts of the oldest are removed."""
    total = 0
    for failure in reversed(failures):
        total += len(json.dumps(failure))
        if total > _LONGEST_ATTEMPTS:
            failure["attempts"] = []
    return json.dumps(failures)
