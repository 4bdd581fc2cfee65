"""Execution of tasks by a worker: intake → execution → settlement, and the lease keeper."""

from __future__ import annotations

from .worker import Worker

__all__ = ["Worker"]
