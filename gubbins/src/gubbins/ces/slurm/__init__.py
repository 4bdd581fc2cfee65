"""Back end `slurm`: jobs of a Slurm site, through its commands."""

from __future__ import annotations

__all__ = ["SlurmBackend", "SlurmSettings"]

from .backend import SlurmBackend
from .settings import SlurmSettings
