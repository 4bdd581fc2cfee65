"""Samples of hostile text."""

from __future__ import annotations

#: Text that some database refuses, changes or takes for other text by default.
TEXTS = (
    "rocket 🚀 and žluťoučký",
    "nul \0 in the middle",
    "half a surrogate pair \ud83d",
    "quotes ' \" ` and \\ and %s :x {y} --",
    "lines\nand\ttabs\x1b[31m",
    "\u202eright to left",
    "€" * 2000,
)
#: Names of which no two are the same.
NAMES = (
    *("lhcb", "LHCB", "lhcb ", "lhcb  ", "lhcb␠", " lhcb", "lhcb\t"),
    *("é", "e\u0301", "e", "ß", "ss", "i", "I", "ж", "🚀", "🛰"),
    *("nul\0", "nul\\x00", "nul", "\ud83d", "\\ud83d"),
    *("l" * 300, "l" * 301, "🚀" * 300, "%", "_", "'", "\\"),
)
