"""The web dashboard: `DashboardApp`, for `diracx-task-run dashboard` and for the DiracX application."""

from .app import DashboardApp

__all__ = ["DashboardApp"]
