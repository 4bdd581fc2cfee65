"""Tables and states of the pilot database, under their published names."""

from gubbins.domain.pilot_states import MyPilotStatus

from ..schema import ComputeElements as MyComputeElements
from ..schema import MyPilotDBBase as Base
from ..schema import Pilots as MyPilotSubmissions

__all__ = ["Base", "MyComputeElements", "MyPilotStatus", "MyPilotSubmissions"]
