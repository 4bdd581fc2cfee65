"""Back end `local`: processes on this host."""

from __future__ import annotations

__all__ = ["LocalBackend", "LocalSettings"]

from .backend import LocalBackend, LocalSettings
