"""Description of the pilots of one VO: submit commands and files.

Submit commands interpret `$` and quotes. So the only value of a pilot in them is its stamp: the environment is set
by a shell script that runs the script of the pilot.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from gubbins.ces.protocol import OUTPUT_LIMIT_BYTES, PilotAtCE

from .settings import HTCondorSettings

_TEMPLATE = Path(__file__).with_name("run.sh")
_SECONDS_OF_A_DAY = 24 * 3600
_LONGEST_DAYS = 60  # longest time from the submission of a pilot to its end


class Submission(TypedDict):
    """Pilots with the same commands and scripts, but for stamps and secrets."""

    commands: dict[str, str]
    carrier: dict[str, str] | None  # additional commands of the carrier; None: each job has its own files
    files: dict[str, str]  # content by name; all are spooled
    stamps: list[str]


def submission(settings: HTCondorSettings, ce_name: str, pilots: Sequence[PilotAtCE]) -> Submission:
    """Describe pilots of one VO, either all with an identity or all without one."""
    commands, files = _commands(settings), _files(settings, ce_name, pilots[0])
    if pilots[0].identity is not None:
        commands["transfer_input_files"] += ", $(stamp).secret"
        files |= {f"{pilot.stamp}.secret": pilot.identity.secret for pilot in pilots if pilot.identity is not None}
    sent_along = [name for name in files if name != commands["executable"]]
    return {
        "commands": commands,
        "carrier": _carrier(settings, sent_along) if settings.spools_together else None,
        "files": files,
        "stamps": [pilot.stamp for pilot in pilots],
    }


def _commands(settings: HTCondorSettings) -> dict[str, str]:
    stay = round(settings.keep_days * _SECONDS_OF_A_DAY)
    commands = {
        "executable": "run",
        "arguments": "$(stamp)",
        # The directory of the process that spools or fetches files.
        "initialdir": "/proc/self/cwd",
        "transfer_input_files": "pilot",
        "transfer_output_files": '""',
        "output": "$(stamp).out",
        "error": "$(stamp).err",
        "should_transfer_files": "YES",
        "when_to_transfer_output": "ON_EXIT",
        "notification": "Never",
        "+GubbinsStamp": '"$(stamp)"',
        "leave_in_queue": f"(JobStatus == 3 || JobStatus == 4) && time() - EnteredCurrentStatus < {stay}",
        "periodic_remove": _to_be_removed(round(settings.held_minutes * 60)),
        "request_cpus": str(settings.cpus),
    }
    if settings.memory_mb is not None:
        commands["request_memory"] = f"{settings.memory_mb}M"
    if settings.disk_mb is not None:
        commands["request_disk"] = f"{settings.disk_mb}M"
    if settings.wall_time_minutes is not None:
        commands["allowed_job_duration"] = str(settings.wall_time_minutes * 60)
    given = dict(settings.submit_commands)
    wanted = [given.pop(name) for name in list(given) if name.lower() == "requirements"]
    commands["requirements"] = " && ".join(["MY.NumJobStarts == 0", *(f"({each})" for each in wanted)])
    return commands | given


def _carrier(settings: HTCondorSettings, names: Sequence[str]) -> dict[str, str]:
    """Commands of a job that completes without running, and keeps its files until its pilots are gone."""
    stay = round((settings.keep_days + _LONGEST_DAYS) * _SECONDS_OF_A_DAY)
    return {
        "noop_job": "true",
        "transfer_input_files": ", ".join(names),
        "leave_in_queue": f"JobStatus == 4 && time() - EnteredCurrentStatus < {stay}",
        "+GubbinsStamp": "undefined",
        "+GubbinsCarrier": "$(Cluster)",
    }


def _to_be_removed(held_seconds: int) -> str:
    """Condition of the schedd for the removal of a job that will not run.

    Hold codes 16 (waits for its files) and 1 (held by a user) are excluded. A restarted job would be a second
    pilot.
    """
    age = "time() - EnteredCurrentStatus"
    return (
        f"(JobStatus == 5 && HoldReasonCode =!= 16 && HoldReasonCode =!= 1 && {age} > {held_seconds})"
        " || (JobStatus == 1 && NumJobStarts > 0)"
    )


def _files(settings: HTCondorSettings, ce_name: str, pilot: PilotAtCE) -> dict[str, str]:
    variables = settings.variables(ce_name, pilot.vo, identity=pilot.identity)
    parts = {
        "exports": "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        "limit": str(OUTPUT_LIMIT_BYTES),
    }
    return {
        # In one pass: inserted text is not searched.
        "run": re.sub(r"@(\w+)@", lambda match: parts[match[1]], _TEMPLATE.read_text()),
        "pilot": settings.executable(pilot.vo),
    }
