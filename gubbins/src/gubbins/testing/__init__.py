"""Tests of the promises of a CE back end, for other packages to use."""

from __future__ import annotations

import pytest

# Before the module is imported for the first time: its assertions are to explain themselves.
pytest.register_assert_rewrite("gubbins.testing.ce_conformance")
