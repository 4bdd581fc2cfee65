"""The pages about pilots in the dashboard of the task system (entry point `diracx.tasks_dashboard`)."""

from __future__ import annotations

__all__ = ["extension"]

from pathlib import Path

from diracx.tasks.web.dashboard.page import Extension

from .actions import ACTIONS
from .pages import PAGES
from .read_models import opened


def extension() -> Extension:
    """Pages and actions for the dashboard of the task system."""
    return Extension(pages=PAGES, actions=ACTIONS, templates=Path(__file__).parent / "templates", lifespan=opened)
