"""What tests of other packages can use: the promises of a CE back end, as tests."""

from __future__ import annotations

import pytest

# Before the module is imported for the first time: its assertions are to explain themselves.
pytest.register_assert_rewrite("gubbins.testing.ce_conformance")
