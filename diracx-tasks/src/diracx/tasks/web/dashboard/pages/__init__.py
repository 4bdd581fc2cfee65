"""The pages, each module with those about one thing: what they show, and what can be done there."""

from __future__ import annotations

from . import audit as record
from . import (
    configuration,
    dead_letters,
    delayed,
    failures,
    groups,
    locks,
    overview,
    queues,
    running,
    schedules,
    workers,
)
from . import tasks as task_classes

_MODULES = (
    overview,
    queues,
    running,
    delayed,
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
