"""Conformance tests of CE back ends, for use by other packages."""

from __future__ import annotations

import pytest

# Before the first import of these modules.
pytest.register_assert_rewrite("gubbins.testing.ce_conformance", "gubbins.testing.pilot_group")
