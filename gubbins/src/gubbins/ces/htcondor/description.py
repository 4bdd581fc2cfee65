"""Submission of the pilots of one VO: commands of the submit language, and two files.

No value of ours but the stamp is in the submit language, which has its own ideas about `$` and quotes: the
environment is in the shell script that runs the pilot's own.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from gubbins.ces.protocol import OUTPUT_LIMIT_BYTES, PilotAtCE
from gubbins.ces.settings import PILOT_SCRIPT, executable_script

from .settings import HTCondorSettings

_TEMPLATE = Path(__file__).with_name("run.sh")
_SECONDS_OF_A_DAY = 24 * 3600


class Submission(TypedDict):
    """Pilots that differ in their stamps and secrets only."""

    commands: dict[str, str]
    files: dict[str, str]  # by name, all of them sent along
    stamps: list[str]


def submission(settings: HTCondorSettings, ce_name: str, pilots: Sequence[PilotAtCE]) -> Submission:
    """The description of these pilots, all of one VO and all with an identity, or all without one."""
    commands, files = _commands(settings), _files(settings, ce_name, pilots[0])
    if pilots[0].identity is not None:
        commands["transfer_input_files"] += ", $(stamp).secret"
        files |= {f"{pilot.stamp}.secret": pilot.identity.secret for pilot in pilots if pilot.identity is not None}
    return {"commands": commands, "files": files, "stamps": [pilot.stamp for pilot in pilots]}


def _commands(settings: HTCondorSettings) -> dict[str, str]:
    stay = round(settings.keep_days * _SECONDS_OF_A_DAY)
    commands = {
        "executable": "run",
        "arguments": "$(stamp)",
        # Wherever the process is that sends or fetches files.
        "initialdir": "/proc/self/cwd",
        "transfer_input_files": "pilot",
        "transfer_output_files": '""',
        "output": "stdout",
        "error": "stderr",
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


def _to_be_removed(held_seconds: int) -> str:
    """Condition by which the schedd itself removes a job that will not run.

    Code 16 is the hold until the files have come, 1 that of a person, who may have a reason.
    A pilot that is started again would be a second one.
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
        # In one pass: what is put in is not looked at again.
        "run": re.sub(r"@(\w+)@", lambda match: parts[match[1]], _TEMPLATE.read_text()),
        "pilot": executable_script(settings.script_of(pilot.vo) or PILOT_SCRIPT),
    }
