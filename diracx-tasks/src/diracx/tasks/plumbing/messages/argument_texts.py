"""Formats arguments of tasks, their types and errors for error messages, on one line."""

from __future__ import annotations

import inspect
import re
from typing import Any

REQUIRED: Any = object()  # the default of a parameter that has none


def type_text(annotation: Any) -> str:
    """Format an annotation without module names."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"(?<![\w<>])(?:[\w<>]+\.)+", "", text)


def shown(value: Any, width: int = 60) -> str:
    """Format a value on one line, truncated to `width`; factories of defaults as `...`."""
    text = "..." if callable(value) else " ".join(repr(value).split())
    return text if len(text) <= width else f"{text[: width - 1]}…"


def reason(exc: BaseException) -> str:
    """Explain why a secret value is refused, without quoting it."""
    from pydantic import ValidationError

    kind = (
        exc.errors(include_url=False, include_input=False)[0]["type"] if isinstance(exc, ValidationError) else ""
    )
    return f"the value is not accepted ({kind or type(exc).__name__})"


def one_line(exc: BaseException, prefix: str = "", given: Any = REQUIRED) -> str:
    """Format an exception on one line; of a validation error, the first one with `prefix` before its path."""
    from pydantic import ValidationError

    if isinstance(exc, ValidationError):
        error = exc.errors(include_url=False)[0]
        place = [str(part) for part in error["loc"]]
        if prefix.endswith(" ") and place:
            where = f"{prefix}{'.'.join(place)!r}: "
        else:
            where = ".".join([prefix, *place]).strip(". ")
            where = f"{where}: " if where else ""
        message = error["msg"].removeprefix("Value error, ")
        return f"{where}{message[:1].lower()}{message[1:]}, given {shown(error['input'])}"
    try:
        text = " ".join(str(exc).split()) if isinstance(exc, Exception) else ""  # a number, of SystemExit
    except BaseException:
        text = ""
    text = text or type(exc).__name__
    return text if given is REQUIRED else f"{prefix}: {text}, given {shown(given)}"
