"""Pilots as jobs of an HTCondor schedd, spooled to it from anywhere; each call of it is a process."""

from __future__ import annotations

__all__ = ["HTCondorBackend", "HTCondorSettings"]

from .backend import HTCondorBackend
from .settings import HTCondorSettings
