"""Pilots as batch jobs of a Slurm site, through its commands; each has a directory on the submit host."""

from __future__ import annotations

__all__ = ["SlurmBackend", "SlurmSettings"]

from .backend import SlurmBackend
from .settings import SlurmSettings
