"""Encode the failed attempts of dead letters as text for every database."""

from __future__ import annotations

import json
from typing import Any

#: Characters of all attempts of a dead letter, and of its history; servers refuse statements of 16 MB.
_LONGEST_ATTEMPTS = 4_000_000


def attempts_as_text(attempts: Any) -> str:
    """Encode attempts as JSON, in ASCII. Those of an invalid message may be anything.

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


def history_as_text(failures: list[dict[str, Any]]) -> str:
    """Write earlier failures as JSON. When they are too long, the oldest lose their attempts."""
    total = 0
    for failure in reversed(failures):
        total += len(json.dumps(failure))
        if total > _LONGEST_ATTEMPTS:
            failure["attempts"] = []
    return json.dumps(failures)
