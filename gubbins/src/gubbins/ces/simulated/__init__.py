"""Simulated compute elements: pilots start, run and end by the clock and a hash."""

from __future__ import annotations

__all__ = ["SimulatedBackend", "SimulatedSettings"]

from .backend import SimulatedBackend, SimulatedSettings
