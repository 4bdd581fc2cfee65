"""Pilots as processes of any Linux host with a shell, reached through SSH; needs the extra `ssh`."""

from __future__ import annotations

__all__ = ["SSHBackend", "SSHError", "SSHHost", "SSHSettings", "SSHShell"]

from .backend import SSHBackend
from .connection import SSHError, SSHShell
from .settings import SSHHost, SSHSettings
