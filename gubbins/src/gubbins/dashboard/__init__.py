"""Dashboard pages and actions for pilots (entry point `diracx.tasks_dashboard`)."""

from __future__ import annotations

__all__ = ["extension"]

from pathlib import Path

from diracx.tasks.web.dashboard.page import Extension

from .actions import ACTIONS
from .pages import PAGES
from .read_models import lifespan


def extension() -> Extension:
    """Make the extension of the dashboard of the task system."""
    templates = Path(__file__).parent / "templates"
    return Extension(pages=PAGES, actions=ACTIONS, templates=templates, lifespan=lifespan)
