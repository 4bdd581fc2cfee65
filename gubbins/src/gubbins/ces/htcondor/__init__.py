"""Back end `htcondor`: jobs of an HTCondor schedd, local or remote; each call is a process."""

from __future__ import annotations

__all__ = ["HTCondorBackend", "HTCondorSettings"]

from .backend import HTCondorBackend
from .settings import HTCondorSettings
