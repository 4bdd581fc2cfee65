"""Execution of tasks by a worker: intake → execution → settlement, and the keeper of leases."""

from __future__ import annotations

from .worker import Worker

__all__ = ["Worker"]
