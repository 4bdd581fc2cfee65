"""The web dashboard of the task system: what there is to see, and what an operator can do about it.

`create_app` makes it, for `diracx-task-run dashboard` and for the DiracX application alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import create_app

__all__ = ["create_app"]


def __getattr__(name: str) -> Any:
    # FastAPI and Jinja2 are only worth their import time to those who serve it.
    if name == "create_app":
        from .app import create_app

        return create_app
    raise AttributeError(name)
