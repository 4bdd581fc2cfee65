"""SQL database of the pilot system: compute elements, pilots and their history."""

from __future__ import annotations

__all__ = ["MyPilotDB", "MyPilotStatus"]

from gubbins.domain.pilot_states import MyPilotStatus

from .my_pilot_db import MyPilotDB
