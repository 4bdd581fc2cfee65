"""Back end `ssh`: processes on a Linux host, through SSH; needs the extra `ssh`."""

from __future__ import annotations

__all__ = ["SSHBackend", "SSHSettings"]

from .backend import SSHBackend
from .settings import SSHSettings
