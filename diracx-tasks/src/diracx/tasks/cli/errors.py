"""Errors that commands report in one line: `CliError`, which users can correct, and `UsageProblem`."""

from __future__ import annotations

from collections.abc import Sequence

from ..plumbing._util.passwords import mask
from ..plumbing._util.printable import printable_line

LONGEST_LINE = 1000


class CliError(Exception):
    """Error that the user can correct, shown as one line without a traceback.

    Args:
        message: names the problem, the value and the remedy.
        exit_code: 2 for a usage error, else 1.
        detail: text to print unchanged before the message, such as the traceback of a task.
        lines: messages to print in place of `message`, one per line.
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


def one_line(text: str, longest: int = LONGEST_LINE) -> str:
    """Return the text as one line of at most `longest` characters, without passwords and control sequences."""
    line = printable_line(mask(text, 8 * LONGEST_LINE))
    return line if len(line) <= longest else line[:longest] + "…"


def shortened(value: str, longest: int = 60) -> str:
    """Truncate and quote a value for use in a message."""
    return repr(value if len(value) <= longest else value[:longest] + "…")
