"""Paths inside the repository."""

from __future__ import annotations

__all__ = ["ROOT", "SUPPORT"]

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""Top of the repository."""

SUPPORT = ROOT / "tests" / "support"
"""Shared helpers of tests; processes of workers are started from files in this folder."""
