"""`MyPilotDB`, in the modules of the published extension."""

from .db import MyPilotDB

__all__ = ["MyPilotDB"]
