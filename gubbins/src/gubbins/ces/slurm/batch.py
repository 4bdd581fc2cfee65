"""Options of sbatch, and scripts of jobs."""

from __future__ import annotations

import base64
import re
import shlex
from pathlib import Path

from gubbins.ces.protocol import PilotAtCE

from .settings import SlurmSettings, SubmitHostSettings

_TEMPLATE = Path(__file__).with_name("batch.sh")


def sbatch_options(settings: SlurmSettings, pilot: PilotAtCE) -> list[str]:
    """Make the options of sbatch, each as one string."""
    job = settings.directory / pilot.stamp
    see = settings.nodes_see_directory
    options = {
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
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    # A requeued job would be a second pilot.
    return ["--parsable", "--no-requeue", *given, *settings.extra_options]


def batch_script(settings: SlurmSettings, ce_name: str, pilot: PilotAtCE) -> bytes:
    """Make the script of a job of Slurm."""
    id = "$SLURM_JOB_ID;$SLURM_CLUSTER_NAME" if settings.clusters else "$SLURM_JOB_ID"
    job = settings.directory / pilot.stamp if settings.nodes_see_directory else None
    return job_script(settings, ce_name, pilot, job, number="$SLURM_JOB_ID", id=id)


def job_script(
    settings: SubmitHostSettings,
    ce_name: str,
    pilot: PilotAtCE,
    job: Path | None,
    *,
    number: str,
    id: str,
    output: str = "",
    shown_to_others: bool = False,
) -> bytes:
    """Make the script of a job, for any batch system.

    Args:
        job: directory of the pilot; None: not visible on the nodes.
        number: shell expression with the job number.
        id: shell expression with the reference of the pilot.
        output: redirections to the directory, unless the batch system does that.
        shown_to_others: True: other users may see the script; the secret is read from the directory.
    """
    identity = pilot.identity
    variables = settings.variables(ce_name, pilot.vo, pilot.stamp, identity)
    parts = {
        "exports": "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        "job": "" if job is None else shlex.quote(str(job)),
        "number": number,
        "id": id,
        "output": output,
        "secret": "" if identity is None or shown_to_others else shlex.quote(identity.secret),
        "script": base64.encodebytes(settings.executable(pilot.vo).encode()).decode().strip(),
    }
    text = re.sub(r"@(\w+)@", lambda match: parts[match[1]], _TEMPLATE.read_text())
    return text.encode()
