"""`TaskDB` under its published module name."""

from .db import TaskDB

__all__ = ["TaskDB"]
