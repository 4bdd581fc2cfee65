"""Describes exceptions as bounded text, without raising."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeAlias

from .._util.passwords import last_lines, mask

#: `type`, `message` and `traceback` of an exception.
ErrorInfo: TypeAlias = dict[str, str]

#: Maximum lengths in characters.
LONGEST_MESSAGE = 4_000
_LONGEST_NAME = 200
LONGEST_TRACEBACK = 8_000


def describe_exception(
    error: BaseException, *, longest: int = LONGEST_TRACEBACK, hide: Callable[[str], str] | None = None
) -> ErrorInfo:
    """Describe an exception: type, message and innermost frames of the traceback. Never raises.

    Args:
        longest: maximum length of the traceback.
        hide: removes secrets from a text.
    """

    def read_text(read: Callable[[], str], default: str) -> str:
        try:
            text = str.__str__(read())
            if hide is not None:  # before truncation, which might leave a part of a secret
                text = str.__str__(hide(text))
            return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
        except BaseException:  # methods of the exception may raise anything
            return default

    name = cut(read_text(lambda: type(error).__name__, "Exception"), _LONGEST_NAME)
    message = cut(read_text(lambda: str(error), f"({name} cannot be shown as text)"))
    lines = read_text(lambda: "".join(traceback.format_exception(error)), f"{name}: {message}\n").split("\n")
    # Lines are truncated first: a long message would leave no frames.
    trace = last_lines("\n".join(map(cut, lines)), longest)
    return {"type": name, "message": message, "traceback": trace}


def cut(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """Truncate a text, but not inside of a password that `mask` would find."""
    return text if len(text) <= longest else mask(text, longest)


def one_line(error: BaseException) -> str:
    """Return type and message of an exception on one line. Never raises."""
    info = describe_exception(error, longest=0)
    return f"{info['type']}: {info['message']}"
