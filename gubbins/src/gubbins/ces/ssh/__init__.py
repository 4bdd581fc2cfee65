"""Pilots as processes of any Linux host with a shell, reached through SSH; needs the extra `ssh`."""

from __future__ import annotations

__all__ = ["SSHBackend", "SSHSettings"]

from .backend import SSHBackend
from .settings import SSHSettings
