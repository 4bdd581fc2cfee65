"""The web dashboard. `create_app` makes it, for `diracx-task-run dashboard` and for the DiracX application."""

from .app import create_app

__all__ = ["create_app"]
