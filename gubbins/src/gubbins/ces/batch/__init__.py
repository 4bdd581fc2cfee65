"""Back end `batch`: jobs of Grid Engine, PBS or LSF, through the commands of a submit host."""

from __future__ import annotations

__all__ = ["BatchBackend", "BatchSettings"]

from .backend import BatchBackend
from .settings import BatchSettings
