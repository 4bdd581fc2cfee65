"""Submission of one pilot to sbatch: options, and the script of the job."""

from __future__ import annotations

import base64
import re
import shlex
from pathlib import Path

from gubbins.ces.protocol import PilotAtCE, PilotIdentity
from gubbins.ces.settings import PILOT_SCRIPT, executable_script

from .settings import SlurmSettings, SubmitHostSettings

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
    id = "$SLURM_JOB_ID;$SLURM_CLUSTER_NAME" if settings.clusters else "$SLURM_JOB_ID"
    job = settings.directory / pilot.stamp if settings.nodes_see_directory else None
    return job_script(settings, ce_name, pilot, job, number="$SLURM_JOB_ID", id=id, identity=pilot.identity)


def job_script(
    settings: SubmitHostSettings,
    ce_name: str,
    pilot: PilotAtCE,
    job: Path | None,
    *,
    number: str,
    id: str,
    output: str = "",
    identity: PilotIdentity | None = None,
    shown_to_others: bool = False,
) -> bytes:
    """The script of a job of any batch system.

    Args:
        settings, ce_name, pilot: as they are.
        job: the pilot's directory, if the nodes have it.
        number: the job's number there, as text for a shell.
        id: what submissions print of it.
        output: redirections to that directory, where the batch system does not make them.
        identity: the pilot's.
        shown_to_others: whether the batch system may show the script: then the secret is a file in that directory.
    """
    variables = settings.variables(ce_name, pilot.vo, pilot.stamp, identity)
    script = executable_script(settings.script_of(pilot.vo) or PILOT_SCRIPT)
    parts = {
        "exports": "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        "job": "" if job is None else shlex.quote(str(job)),
        "number": number,
        "id": id,
        "output": output,
        "secret": "" if identity is None or shown_to_others else shlex.quote(identity.secret),
        "script": base64.encodebytes(script.encode()).decode().strip(),
    }
    # In one pass: what is put in is not looked at again.
    text = re.sub(r"@(\w+)@", lambda match: parts[match[1]], _TEMPLATE.read_text())
    return text.encode()
