"""Pilots as processes of this host, each under a wrapper that leaves its fate in a directory."""

from __future__ import annotations

__all__ = ["LocalBackend", "LocalSettings"]

from .backend import LocalBackend, LocalSettings
