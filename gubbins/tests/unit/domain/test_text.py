"""Messages of sites are reduced to one line for databases and terminals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gubbins.domain.text import MAX_LINE_CHARS, one_line

_anything = st.text(st.characters() | st.characters(categories=["Cs", "Cc", "Cf", "Zl"]), max_size=20)


@given(_anything, st.integers(1, 30))
def test_one_line_is_printable_and_bounded_for_any_text(said: str, limit: int) -> None:
    line = one_line(said, limit)
    assert line.isprintable()
    assert len(line) <= limit
    assert line == line.strip()
    assert line.encode().decode() == line


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (" too\n\tmuch\r\n", "too much"),
        ("a\0b\ud800c", "a b c"),
        ("red \x1b[31m\u202e", "red [31m"),
        ("naïve 🚀", "naïve 🚀"),
        ("x" * 5000, "x" * MAX_LINE_CHARS),
        (OSError("no\nroute"), "no route"),
        (OSError("\0"), "OSError"),
        (TimeoutError(), "TimeoutError"),
        ("\0", ""),
    ],
)
def test_text_is_kept_and_unprintable_characters_become_spaces(said: object, line: str) -> None:
    assert one_line(said) == line
