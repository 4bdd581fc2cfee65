"""Back ends of compute elements: their protocol and registry, and a package for each kind of site.

A back end is a class named by an entry point of the group `gubbins.ces`.
"""

from __future__ import annotations

__all__ = [
    "CEBackend",
    "CEDescription",
    "NothingDoneError",
    "Observation",
    "Observed",
    "PilotAtCE",
    "PilotIdentity",
    "PilotOutput",
    "SubmitOutcome",
    "available_backends",
    "make_backend",
    "validate_settings",
]

from .protocol import (
    CEBackend,
    CEDescription,
    NothingDoneError,
    Observation,
    Observed,
    PilotAtCE,
    PilotIdentity,
    PilotOutput,
    SubmitOutcome,
)
from .registry import available_backends, make_backend, validate_settings
