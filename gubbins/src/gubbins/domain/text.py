"""What sites say, as it may be shown and kept."""

from __future__ import annotations

__all__ = ["MAX_LINE_CHARS", "one_line", "without_nul"]

MAX_LINE_CHARS = 300
"""What a site says about one pilot is not told at greater length."""


def one_line(said: object, max_chars: int = MAX_LINE_CHARS) -> str:
    """One line of printable text, at most `max_chars` long, whatever was said; an error without words is its type.

    Control characters and halves of characters are spaces: no database takes them all, and a terminal obeys them.
    """
    words = " ".join("".join(each if each.isprintable() else " " for each in str(said)).split())
    if not words and isinstance(said, BaseException):
        words = type(said).__name__
    return words[:max_chars].strip()


def without_nul(text: str) -> str:
    """The text, which may go to a shell or a file of C strings; for settings.

    Raises:
        ValueError: it contains a NUL.
    """
    if "\0" in text:
        raise ValueError("must not contain a NUL")
    return text
