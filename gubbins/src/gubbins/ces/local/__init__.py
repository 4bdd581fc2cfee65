"""Back end `local`: pilots are processes of this host, each with a directory."""

from __future__ import annotations

__all__ = ["LocalBackend", "LocalSettings"]

from .backend import LocalBackend, LocalSettings
