"""What the pilot tasks have injected."""

from __future__ import annotations

__all__ = ["PilotDB"]

from typing import Annotated

from diracx.tasks.plumbing.depends import NoTransaction

from gubbins.db.sql import MyPilotDB

# The alias carries the marker; the name of the parameter is what extensions already pass by keyword.
PilotDB = Annotated[MyPilotDB, NoTransaction()]
