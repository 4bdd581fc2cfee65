"""Removes control characters from text for terminals and logs."""

from __future__ import annotations

import re

#: Control and formatting characters, surrogates, and all line ends except `\n`.
_UNPRINTABLE = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164"
    "\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff]"
)
_REPLACEMENT = "�"


def printable(text: str) -> str:
    """Replace control and formatting characters and surrogates by `�`. Line feeds and tabs stay."""
    return text if text.isprintable() else _UNPRINTABLE.sub(_REPLACEMENT, text)


def printable_line(text: str) -> str:
    """Convert a text to one line, with `printable` and single blanks as white space."""
    return printable(" ".join(text.split()))
