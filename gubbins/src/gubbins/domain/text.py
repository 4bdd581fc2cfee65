"""Sanitize text from sites for display and storage."""

from __future__ import annotations

MAX_LINE_CHARS = 300
"""Longest reason about one pilot."""


def one_line(said: object, max_chars: int = MAX_LINE_CHARS) -> str:
    """Reduce text or an error to one printable line of at most `max_chars`; an error without words is its type.

    Control characters and halves of characters are spaces: no database takes them all, and a terminal obeys them.
    """
    words = " ".join("".join(each if each.isprintable() else " " for each in str(said)).split())
    if not words and isinstance(said, BaseException):
        words = type(said).__name__
    return words[:max_chars].strip()


def without_nul(text: str) -> str:
    """Refuse a NUL in text of settings, which may go to a shell.

    Raises:
        ValueError: it contains a NUL.
    """
    if "\0" in text:
        raise ValueError("must not contain a NUL")
    return text
