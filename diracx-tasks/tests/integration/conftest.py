"""Clears the record of the standard tasks before each test."""

from __future__ import annotations

import pytest
from support.standard_tasks import SEEN


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    SEEN.clear()
