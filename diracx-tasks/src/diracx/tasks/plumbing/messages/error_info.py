"""Describe exceptions as text. Describing never raises, and is never long."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from .._util.passwords import last_lines, mask

#: What is told of an exception: its `type`, `message` and `traceback`.
ErrorInfo: TypeAlias = dict[str, str]

#: Characters of a message, and of a name.
LONGEST_MESSAGE = 4_000
_LONGEST_NAME = 200
#: Characters of a traceback.
LONGEST_TRACEBACK = 8_000


def describe_exception(
    error: BaseException, *, longest: int = LONGEST_TRACEBACK, hide: Callable[[str], str] | None = None
) -> ErrorInfo:
    """Describe an exception: type, message and (the end of) the traceback. Never raises.

    Args:
        longest: characters of the traceback.
        hide: takes out of a text what is not to be told.
    """

    def told(read: Callable[[], str], instead: str) -> str:
        try:
            text = str.__str__(read())
            if hide is not None:  # before it is cut, or half of what is to be hidden could be left
                text = str.__str__(hide(text))
            return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
        except BaseException:  # methods of the exception's own may raise anything
            return instead

    name = cut(told(lambda: type(error).__name__, "Exception"), _LONGEST_NAME)
    message = cut(told(lambda: str(error), f"({name} cannot be shown as text)"))
    lines = told(lambda: _traceback(error), f"{name}: {message}\n").split("\n")
    # Line by line first: a long message would leave nothing of the frames.
    trace = last_lines("\n".join(map(cut, lines)), longest)
    return {"type": name, "message": message, "traceback": trace}


def _traceback(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))


def cut(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """Cut a text, not in the middle of a password that `mask` would find."""
    return text if len(text) <= longest else mask(text, longest)


def one_line(error: BaseException) -> str:
    """Return type and message of an exception on one line. Never raises."""
    told = describe_exception(error, longest=0)
    return f"{told['type']}: {told['message']}"
