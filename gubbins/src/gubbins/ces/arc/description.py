"""Description of a pilot in xRSL."""

from __future__ import annotations

from collections.abc import Mapping

from .settings import ArcSettings
from .xrsl import UNPACK_AND_RUN, VARIABLE, AttributeValue, pack, relation

STDOUT = "stdout"
STDERR = "stderr"


def describe(
    settings: ArcSettings, script: str, stamp: str, environment: Mapping[str, str], secret: str | None = None
) -> str:
    """Make the description of one pilot."""
    relations: list[tuple[str, AttributeValue | None]] = [
        ("executable", "/bin/sh"),
        ("arguments", ["-c", UNPACK_AND_RUN]),
        ("jobname", stamp),
        ("environment", [[VARIABLE, pack(script, environment, secret)]]),
        ("stdout", STDOUT),
        ("stderr", STDERR),
        # Other files are removed at the end of the job.
        ("outputfiles", [[STDOUT, ""], [STDERR, ""]]),
        ("queue", settings.queue),
        ("count", settings.cpus),
        ("countpernode", settings.cpus if settings.cpus > 1 else None),
        ("memory", settings.memory_mb),
        ("walltime", settings.wall_time_minutes and f"{settings.wall_time_minutes} minutes"),
        ("cputime", settings.cpu_time_minutes and f"{settings.cpu_time_minutes} minutes"),
        *settings.attributes.items(),
    ]
    return "&" + "".join(relation(name, value) for name, value in relations if value is not None)
