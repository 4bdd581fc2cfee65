"""Requirements that cannot be installed: tests that need one are skipped, even with NO_SKIPS."""

from __future__ import annotations

__all__ = ["NotForThisMachine", "not_for_this_machine"]

from typing import NoReturn

import pytest


class NotForThisMachine(pytest.skip.Exception):
    """A skip that is no failure with NO_SKIPS in the environment."""


def not_for_this_machine(reason: str) -> NoReturn:
    """Skip the test, or all tests of the fixture, for a requirement of the machine."""
    raise NotForThisMachine(reason)
