"""The pages, each module with those about one thing: what they show, and what can be done there."""

from __future__ import annotations

from . import (
    configuration,
    dead_letters,
    failures,
    groups,
    locks,
    overview,
    queues,
    record,
    running,
    schedules,
    waiting,
    workers,
)
from . import tasks as task_classes

_MODULES = (
    overview,
    queues,
    running,
    waiting,
    workers,
    task_classes,
    failures,
    dead_letters,
    schedules,
    locks,
    groups,
    configuration,
    record,
)

#: In the order of the navigation.
PAGES = [page for module in _MODULES for page in module.PAGES]
ACTIONS = [action for module in _MODULES for action in getattr(module, "ACTIONS", ())]
