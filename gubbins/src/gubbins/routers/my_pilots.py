"""Routes of `/api/my_pilots/`: the entry point of `diracx.services`."""

from __future__ import annotations

from . import compute_elements, pilot_identity, pilots  # noqa: F401  # they add their routes to the router
from .access import router

__all__ = ["router"]
