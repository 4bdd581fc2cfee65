"""Types of the injected parameters of pilot tasks."""

from __future__ import annotations

from typing import Annotated

from diracx.db.sql import JobDB, PilotAgentsDB, ResourceStatusDB, TaskQueueDB
from diracx.tasks.plumbing.depends import NoTransaction

from gubbins.db.sql import MyPilotDB

# The aliases carry the marker; the names of the parameters are what extensions already pass by keyword.
PilotDB = Annotated[MyPilotDB, NoTransaction()]
WaitingJobs = Annotated[JobDB, NoTransaction()]
TaskQueues = Annotated[TaskQueueDB, NoTransaction()]
ResourceStatus = Annotated[ResourceStatusDB, NoTransaction()]
PilotRegistry = Annotated[PilotAgentsDB, NoTransaction()]
