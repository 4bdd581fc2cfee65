"""Escape control characters of foreign text for terminals and logs."""

from __future__ import annotations

import re

#: What may steer a terminal, hide or reorder text, or cannot be encoded; and every end of a line but `\n`.
_UNPRINTABLE = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164"
    "\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff]"
)
_REPLACEMENT = "�"


def printable(text: str) -> str:
    """Remove control and formatting characters from a text (escape sequences, bidirectional overrides, halves of
    surrogate pairs): `�` stands where they were. Line feeds and tabs stay.
    """
    return text if text.isprintable() else _UNPRINTABLE.sub(_REPLACEMENT, text)


def printable_line(text: str) -> str:
    """As `printable`, on one line: all white space becomes single blanks."""
    return printable(" ".join(text.split()))
