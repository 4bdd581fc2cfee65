"""`MyPilotDB`, under the module names of the published extension."""

from .db import MyPilotDB

__all__ = ["MyPilotDB"]
