"""Submission of one pilot to sbatch: options, and the script of the job."""

from __future__ import annotations

import base64
import re
import shlex
from pathlib import Path

from gubbins.ces.protocol import PilotAtCE
from gubbins.ces.settings import executable_script

from .settings import SlurmSettings

_TEMPLATE = Path(__file__).with_name("batch.sh")


def sbatch_options(settings: SlurmSettings, pilot: PilotAtCE) -> list[str]:
    """The options of sbatch, each as one string."""
    job = settings.directory / pilot.stamp
    see = settings.nodes_see_directory
    chosen = {
        "job-name": pilot.stamp,
        "comment": pilot.stamp,
        "chdir": "/",
        "output": job / "stdout" if see else "/dev/null",
        "error": job / "stderr" if see else "/dev/null",
        "clusters": settings.clusters,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "cpus-per-task": settings.cpus,
        "mem": f"{settings.memory_mb}M" if settings.memory_mb else None,
        "time": settings.wall_minutes,
    }
    given = [f"--{name}={value}" for name, value in chosen.items() if value is not None]
    # A pilot that is started again would be a second one.
    return ["--parsable", "--no-requeue", *given, *settings.extra_options]


def batch_script(settings: SlurmSettings, ce_name: str, pilot: PilotAtCE) -> bytes:
    """The script of the job, with the pilot's own script in it."""
    variables = settings.variables(ce_name, pilot.vo, pilot.stamp)
    script = executable_script(settings.scripts.get(pilot.vo, settings.default_script))
    parts = {
        "exports": "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        "job": shlex.quote(str(settings.directory / pilot.stamp)) if settings.nodes_see_directory else "",
        "id": "$SLURM_JOB_ID;$SLURM_CLUSTER_NAME" if settings.clusters else "$SLURM_JOB_ID",
        "script": base64.encodebytes(script.encode()).decode().strip(),
    }
    # In one pass: what is put in is not looked at again.
    text = re.sub(r"@(\w+)@", lambda match: parts[match[1]], _TEMPLATE.read_text())
    return text.encode()
