"""Errors of commands: one line that names the thing, the value and the way out."""

from __future__ import annotations

from collections.abc import Sequence

from ..plumbing._util.passwords import mask
from ..plumbing._util.printable import printable_line

_LONGEST = 1000


class CliError(Exception):
    """Error that the user can mend. Shown as one line, without a traceback.

    Args:
        message: what, which value, and the way out.
        exit_code: 2 when the command line itself is wrong, else 1.
        detail: shown as it is before the line, as the traceback of a task.
        lines: several messages, one for each mistake, in place of the one.
    """

    def __init__(
        self, message: str, *, exit_code: int = 1, detail: str = "", lines: Sequence[str] | None = None
    ) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.detail = detail
        self.lines = lines or [message]


class UsageProblem(CliError):
    """Usage error: invalid arguments or options."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=2)


def one_line(text: str) -> str:
    """The text on one line, not too long, without passwords and without what would steer a terminal."""
    line = printable_line(mask(text, 8 * _LONGEST))
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "…"


def shortened_line(text: str, longest: int) -> str:
    """The beginning of the text on one line, as `one_line` makes it."""
    line = one_line(text)
    return line if len(line) <= longest else line[:longest] + "…"


def shortened(value: str, longest: int = 60) -> str:
    """A value for use inside a message, in quotes."""
    return repr(value if len(value) <= longest else value[:longest] + "…")
