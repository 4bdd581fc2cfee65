"""The web dashboard of the task system: what there is to see, and what an operator can do about it.

`create_app` makes it, for `diracx-task-run dashboard` and for the DiracX application alike.
"""

from .app import create_app

__all__ = ["create_app"]
