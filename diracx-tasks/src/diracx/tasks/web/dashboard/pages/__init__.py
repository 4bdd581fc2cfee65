"""Pages and actions of the dashboard, one module per subject."""

from __future__ import annotations

from importlib import import_module

#: Modules in the order of the navigation.
_NAMES = (
    *("overview", "queues", "workers", "tasks", "dead_letters"),
    *("schedules", "locks", "groups", "configuration", "audit"),
)
_MODULES = [import_module(f"{__name__}.{name}") for name in _NAMES]
PAGES = [page for module in _MODULES for page in module.PAGES]
ACTIONS = [action for module in _MODULES for action in getattr(module, "ACTIONS", ())]
