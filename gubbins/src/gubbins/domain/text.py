"""Sanitization of text from sites for display and storage."""

from __future__ import annotations

MAX_LINE_CHARS = 300
"""Longest reason about one pilot."""


def one_line(value: object, max_chars: int = MAX_LINE_CHARS) -> str:
    """Reduce text or an error to one printable line of at most `max_chars`; an error without text to its type.

    Unprintable characters become spaces: control characters affect terminals, and databases refuse surrogates.
    """
    text = " ".join("".join(each if each.isprintable() else " " for each in str(value)).split())
    if not text and isinstance(value, BaseException):
        text = type(value).__name__
    return text[:max_chars].strip()


def without_nul(text: str) -> str:
    """Refuse NUL characters in settings, which may be passed to a shell.

    Raises:
        ValueError: it contains a NUL.
    """
    if "\0" in text:
        raise ValueError("must not contain a NUL")
    return text
