"""Regular expressions take linear time for any text."""

from __future__ import annotations

from pathlib import Path

import diracx.tasks
import pytest
from support.all_patterns import assert_linear, patterns_of

PATTERNS = patterns_of(Path(diracx.tasks.__file__).parent)


@pytest.mark.parametrize("where", PATTERNS)
def test_a_pattern_takes_linear_time(where: str) -> None:
    assert_linear(*PATTERNS[where])
