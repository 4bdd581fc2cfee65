"""Dependency injection, under the import path of routers and logic."""

from __future__ import annotations

from .plumbing.depends import (
    AvailableSecurityProperties,
    CallbackSpawner,
    Config,
    NoTransaction,
    auto_inject,
    auto_inject_depends,
)

__all__ = [
    "AvailableSecurityProperties",
    "CallbackSpawner",
    "Config",
    "NoTransaction",
    "auto_inject",
    "auto_inject_depends",
]
