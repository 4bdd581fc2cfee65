"""Back end `arc`: jobs of an ARC CE, through the REST interface of A-REX (1.0)."""

from __future__ import annotations

__all__ = ["ArcBackend", "ArcSettings"]

from .backend import ArcBackend
from .settings import ArcSettings
