"""Definitions of batch systems: their commands, and parsers of their output.

Grid Engine is tested with a real installation, PBS and LSF with output from their manuals.
"""

from __future__ import annotations

__all__ = ["SYSTEMS", "BatchSystem"]

import html
import re
import shlex
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

from gubbins.ces.protocol import PilotAtCE
from gubbins.ces.site_errors import SiteErrors
from gubbins.ces.slurm.jobs import Job, Jobs, is_job_number

from .settings import BatchSettings


class BatchSystem(NamedTuple):
    """Definition of a batch system. States of jobs are mapped to those of Slurm, for `slurm.jobs.observe_jobs`."""

    submit: Callable[[BatchSettings, PilotAtCE], list[str]]
    """Makes the command for submission, which reads the script from stdin and writes no files."""
    number: str
    """Sed script that extracts the job number from the output of `submit`."""
    variable: str
    """Shell expression with the job number, in the job."""
    find: Callable[[str], str]
    """Makes a shell command that prints the job numbers of a stamp."""
    queue: list[str]
    """Command that lists jobs."""
    parse: Callable[[str], Jobs]
    """Parses the output of `queue` to jobs by stamp."""
    cancel: str
    """Command that cancels jobs, given by number."""
    errors: SiteErrors
    listing: str
    """Pattern of the output of `queue`."""
    nothing: str = r"(?!)"
    """Pattern of the error of `queue` if there are no jobs."""
    unknown_job: str = r"does not exist|unknown job|already finished|has finished|not found|no matching job"
    """Pattern of the error of `cancel` for jobs that have ended."""


def name_of(stamp: str) -> str:
    """Name of a job, which must not begin with a digit."""
    return f"p{stamp}"


def _options(**options: object) -> list[str]:
    return [word for name, value in options.items() if value is not None for word in (f"-{name}", str(value))]


# Of a command that prints a message of the site in place of jobs.
_FAIL = """printf '%s\n' "$found" >&2; exit 1"""


def _numbers(none: str = "''") -> str:
    """Make a shell command that prints the job numbers in $found, or fails unless it matches `none`."""
    numbers = r"""printf '%s\n' "$found" | grep -x '[0-9]\{1,18\}[^ ]*'"""
    return f"{numbers} || case $found in {none}) ;; *) {_FAIL} ;; esac"


def _clock(minutes: int | None) -> str | None:
    return None if minutes is None else f"{minutes // 60}:{minutes % 60:02}:00"


def _limits(**values: object) -> list[str]:
    limits = ",".join(f"{name}={value}" for name, value in values.items() if value is not None)
    return ["-l", limits] if limits else []


# -- Grid Engine

# All of our jobs, also if the account or the site has other defaults.
_QSTAT = ["qstat", "-xml", "-s", "a", "-u", "$user"]


def _gridengine(settings: BatchSettings, pilot: PilotAtCE) -> list[str]:
    memory = settings.memory_mb and f"{settings.memory_mb}M"
    return [
        *("qsub", "-terse", "-b", "n", "-r", "n", "-S", "/bin/sh", "-wd", "/"),
        *_options(N=name_of(pilot.stamp), o="/dev/null", e="/dev/null", q=settings.queue, A=settings.account),
        *_limits(h_rt=_clock(settings.wall_minutes), h_vmem=memory),
    ]


def _gridengine_jobs(text: str) -> Jobs:
    jobs: Jobs = defaultdict(list)
    for row in text.split("<job_list")[1:]:
        fields = dict(re.findall(r"<(JB_job_number|JB_name|state)>([^<]*)<", row))
        number, name, state = (fields.get(field, "") for field in ("JB_job_number", "JB_name", "state"))
        if is_job_number(number) and name.startswith("p"):
            reason = "in error state (Eqw)" if "E" in state else "on hold (hqw)"
            reason = f"Grid Engine: {reason}" if set(state) & {"E", "h"} else ""
            known = "PENDING" if "q" in state else "RUNNING"
            jobs[html.unescape(name[1:])].append(Job(number, known, "", reason))
    return jobs


def _gridengine_find(stamp: str) -> str:
    row = rf"s#.*<JB_job_number>\([0-9]*\)</JB_job_number>.*<JB_name>{name_of(stamp)}</JB_name>.*#\1#p"
    rows = r"""printf '%s' "$found" | tr -d '\n' | sed 's#</job_list>#&\n#g'"""
    listed = f"case $found in *'</job_info>'*) {rows} | sed -n {shlex.quote(row)} ;; *) {_FAIL} ;; esac"
    return f"found=$({shlex.join(_QSTAT)}) || exit; {listed}"


# -- PBS (PBS Professional, OpenPBS; Torque)


def _pbs(settings: BatchSettings, pilot: PilotAtCE) -> list[str]:
    chunk = {"ncpus": settings.cpus, "mem": settings.memory_mb and f"{settings.memory_mb}mb"}
    select = "".join(f":{name}={value}" for name, value in chunk.items() if value is not None)
    return [*_qsub(settings, pilot), *(["-l", f"select=1{select}"] if select else [])]


def _torque(settings: BatchSettings, pilot: PilotAtCE) -> list[str]:
    nodes = settings.cpus and f"1:ppn={settings.cpus}"
    memory = settings.memory_mb and f"{settings.memory_mb}mb"
    return [*_qsub(settings, pilot), *_limits(nodes=nodes, mem=memory)]


def _qsub(settings: BatchSettings, pilot: PilotAtCE) -> list[str]:
    return [
        *("qsub", "-r", "n", "-S", "/bin/sh", "-v", f"PILOT_STAMP={pilot.stamp}"),
        # Some versions refuse names of more than 15 characters.
        *_options(N=name_of(pilot.stamp)[:15], o="/dev/null", e="/dev/null", q=settings.queue, A=settings.account),
        *_limits(walltime=_clock(settings.wall_minutes)),
    ]


_PBS_STATES = {**dict.fromkeys("QHWT", "PENDING"), **dict.fromkeys("RESUB", "RUNNING"), "M": "REVOKED"}


def _pbs_jobs(text: str) -> Jobs:
    jobs: Jobs = defaultdict(list)
    # Continuation lines begin with a tab.
    for record in f"\n{text}".replace("\n\t", "").split("\nJob Id: ")[1:]:
        number = re.match(r"\d{1,18}", record)
        fields: dict[str, str] = dict(re.findall(r"^ {4}([\w.]+) = (.*)$", record, re.M))
        stamp = re.search(r"\bPILOT_STAMP=([\w.-]+)", fields.get("Variable_List", ""))
        state = fields.get("job_state", "")
        if number is None or stamp is None or state in ("", "C", "F", "X"):  # ended: see its directory
            continue
        reason = f"PBS: {fields.get('comment', 'on hold')}" if state == "H" else ""
        jobs[stamp[1]].append(Job(number[0], _PBS_STATES.get(state, state), "", reason))
    return jobs


# -- LSF


def _lsf(settings: BatchSettings, pilot: PilotAtCE) -> list[str]:
    memory = settings.memory_mb and f"{settings.memory_mb}MB"  # without a unit it depends on the site
    return [
        *("bsub", "-rn", "-L", "/bin/sh"),
        *_options(J=name_of(pilot.stamp), o="/dev/null", e="/dev/null", q=settings.queue, P=settings.account),
        *_options(n=settings.cpus, R=settings.cpus and "span[hosts=1]", M=memory, W=settings.wall_minutes),
    ]


def _lsf_find(stamp: str) -> str:
    # bjobs also fails if there is no job.
    numbers = _numbers("*'not found'*")
    return f"found=$(bjobs -a -noheader -o jobid -J {shlex.quote(name_of(stamp))} 2>&1); {numbers}"


_LSF_STATES = {
    **dict.fromkeys(("PEND", "PSUSP", "WAIT", "FWD_PEND"), "PENDING"),
    **dict.fromkeys(("PROV", "RUN", "SSUSP", "UNKWN", "USUSP", "ZOMBI"), "RUNNING"),
    "DONE": "COMPLETED",
    "EXIT": "FAILED",
}
_LSF_PLAIN = {"-", "", "New job is waiting for scheduling", "New job is waiting for scheduling;"}


def _lsf_jobs(text: str) -> Jobs:
    jobs: Jobs = defaultdict(list)
    for line in text.split("\n"):
        fields = [field.strip() for field in line.split("|", 4)]
        if len(fields) == 5 and fields[0].isdecimal() and fields[2].startswith("p"):
            number, state, name, code, why = fields
            reason = f"LSF: {why}" if state in ("PEND", "PSUSP") and why not in _LSF_PLAIN else ""
            known = _LSF_STATES.get(state, state)
            jobs[name[1:]].append(Job(number, known, code if code.isdecimal() else "", reason))
    return jobs


SYSTEMS = {
    "gridengine": BatchSystem(
        submit=_gridengine,
        number=r's/^\(Your job \)\{0,1\}\([0-9]\{1,18\}\)\( (".*") has been submitted\)\{0,1\}[[:space:]]*$/\2/p',
        variable="$JOB_ID",
        find=_gridengine_find,
        queue=_QSTAT,
        parse=_gridengine_jobs,
        listing="</job_info>",
        cancel="qdel",
        errors=SiteErrors(
            quota=r"only \d+ jobs are allowed|no more than \d+ jobs|exceed\w* .*(per user|job limit)",
            # Warnings do not match, since such a job was submitted.
            refusal=r"job was rejected|is not a \w+ value|unknown (option|resource)|unable to read script"
            r"|no suitable queues|invalid option|job rejected|denied: |does not exist",
        ),
    ),
    "pbs": BatchSystem(
        submit=_pbs,
        number=r"s/^\([0-9]\{1,18\}\)\(\.[A-Za-z0-9_.-]\{1,200\}\)\{0,1\}[[:space:]]*$/\1/p",
        variable="${PBS_JOBID%%[!0-9]*}",
        find=lambda stamp: f"found=$(qselect -N {shlex.quote(name_of(stamp)[:15])}) || exit; {_numbers()}",
        queue=["qstat", "-f"],
        parse=_pbs_jobs,
        listing=r"^Job Id: |\A\s*\Z",
        cancel="qdel",
        errors=SiteErrors(
            quota=r"would exceed .*(limit|maximum)|maximum number of jobs",
            refusal=r"unknown (queue|resource)|unauthorized request|violates queue and/or server resource limits"
            r"|illegal (attribute|-\w+ value)|rejected by all possible destinations|invalid account|bad uid"
            r"|queue is not enabled|access to queue is denied|^usage: qsub|job rejected|would exceed"
            r"|exceeds queue resource limits|administratively rejected|filter returned an error|no default queue",
        ),
    ),
    "lsf": BatchSystem(
        submit=_lsf,
        number=r"s/^\(Job <\)\{0,1\}\([0-9]\{1,18\}\)\(> is submitted to .*\)\{0,1\}$/\2/p",
        variable="$LSB_JOBID",
        find=_lsf_find,
        queue=["bjobs", "-a", "-noheader", "-o", "jobid stat name exit_code pend_reason delimiter='|'"],
        parse=_lsf_jobs,
        listing=r"\||\A\s*\Z",
        cancel="bkill",
        errors=SiteErrors(
            quota=r"maximum number of .*jobs|(job|pending) threshold|jobs? limit",
            refusal=r"no such (queue|user|project)|user cannot use the queue|request aborted by esub"
            r"|bad (resource requirement|argument)|illegal (option|job)|job not submitted",
        ),
        nothing=r"^no (unfinished |matching )?job found",
    ),
}
SYSTEMS["torque"] = SYSTEMS["pbs"]._replace(submit=_torque)
