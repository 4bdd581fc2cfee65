"""Paths inside the repository."""

from __future__ import annotations

__all__ = ["NO_AUTHORITY", "ROOT", "SUPPORT"]

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""Top of the repository."""

SUPPORT = ROOT / "tests" / "support"
"""Shared helpers of tests; processes of workers are started from files in this folder."""

NO_AUTHORITY = SUPPORT / "no_authority.pem"
"""Certificate of an authority that has signed nothing: tests read it instead of the public authorities'."""
