"""Templates of batch systems: the words of their commands and of their answers.

Grid Engine is tested for real; PBS and LSF by answers as their manuals have them.
"""

from __future__ import annotations

__all__ = ["SYSTEMS", "BatchSystem"]

import html
import re
import shlex
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

from gubbins.ces.judging import SiteWords
from gubbins.ces.protocol import PilotAtCE
from gubbins.ces.slurm.jobs import Job, is_job_number
from gubbins.domain.exceptions import CEUnavailableError

from .settings import BatchSettings

Jobs = dict[str, list[Job]]


class BatchSystem(NamedTuple):
    """Template of a batch system. States of jobs are those of Slurm, which `slurm.jobs.judge` knows."""

    submit: Callable[[BatchSettings, PilotAtCE], list[str]]
    """The command with its options; the script comes on its standard input, and its output goes to no file."""
    number: str
    """A sed script that prints the job's number of a line that is one."""
    variable: str
    """The number of a job, as the shell of the job has it."""
    find: Callable[[str], str]
    """Shell text that prints the numbers of the jobs of a stamp."""
    queue: list[str]
    parse: Callable[[str], Jobs]
    """The jobs by stamp, from the output of `queue`.

    Raises:
        CEUnavailableError: it is cut off.
    """
    cancel: str
    words: SiteWords
    nothing: str = r"(?!)"
    """Message of `queue` when there is no job, and it fails."""
    gone: str = r"does not exist|unknown job|already finished|has finished|not found"
    """Message of `cancel` about jobs that have ended."""


def name_of(stamp: str) -> str:
    """The name of a job; it must not begin with a digit."""
    return f"p{stamp}"


def _given(**options: object) -> list[str]:
    """Options with their values, those that have one."""
    return [word for name, value in options.items() if value is not None for word in (f"-{name}", str(value))]


def _clock(minutes: int | None) -> str | None:
    return None if minutes is None else f"{minutes // 60}:{minutes % 60:02}:00"


def _limits(**values: object) -> list[str]:
    given = [f"{name}={value}" for name, value in values.items() if value is not None]
    return ["-l", ",".join(given)] if given else []


# -- Grid Engine


def _gridengine(settings: BatchSettings, pilot: PilotAtCE) -> list[str]:
    memory = settings.memory_mb and f"{settings.memory_mb}M"
    return [
        *("qsub", "-terse", "-r", "n", "-S", "/bin/sh", "-wd", "/"),
        *_given(N=name_of(pilot.stamp), o="/dev/null", e="/dev/null", q=settings.queue, A=settings.account),
        *_limits(h_rt=_clock(settings.wall_minutes), h_vmem=memory),
    ]


def _gridengine_jobs(text: str) -> Jobs:
    if "</job_info>" not in text[-200:]:
        raise CEUnavailableError("qstat: its answer is cut off")
    jobs: Jobs = defaultdict(list)
    for row in text.split("<job_list")[1:]:
        fields = dict(re.findall(r"<(JB_job_number|JB_name|state)>([^<]*)<", row))
        number, name, state = (fields.get(field, "") for field in ("JB_job_number", "JB_name", "state"))
        if is_job_number(number) and name.startswith("p"):
            reason = "in error state (Eqw)" if "E" in state else "on hold (hqw)" if "h" in state else ""
            known = "PENDING" if "q" in state else "RUNNING"
            jobs[html.unescape(name[1:])].append(
                Job(number, known, "", f"Grid Engine: {reason}" if reason else "")
            )
    return jobs


def _gridengine_find(stamp: str) -> str:
    row = rf"s#.*<JB_job_number>\([0-9]*\)</JB_job_number>.*<JB_name>{name_of(stamp)}</JB_name>.*#\1#p"
    rows = r"""printf '%s' "$told" | tr -d '\n' | sed 's#</job_list>#&\n#g'"""
    return f"told=$(qstat -xml) || exit; {rows} | sed -n {shlex.quote(row)}"


# -- PBS (PBS Professional, OpenPBS; Torque)


def _pbs(settings: BatchSettings, pilot: PilotAtCE) -> list[str]:
    chunk = {"ncpus": settings.cpus, "mem": settings.memory_mb and f"{settings.memory_mb}mb"}
    select = "".join(f":{name}={value}" for name, value in chunk.items() if value is not None)
    return [
        *("qsub", "-r", "n", "-S", "/bin/sh", "-v", f"PILOT_STAMP={pilot.stamp}"),
        # Names of more than 15 characters are refused by some.
        *_given(N=name_of(pilot.stamp)[:15], o="/dev/null", e="/dev/null", q=settings.queue, A=settings.account),
        *_limits(walltime=_clock(settings.wall_minutes)),
        *(["-l", f"select=1{select}"] if select else []),
    ]


_PBS_STATES = {"Q": "PENDING", "H": "PENDING", "W": "PENDING", "T": "PENDING", "M": "REVOKED"}


def _pbs_jobs(text: str) -> Jobs:
    jobs: Jobs = defaultdict(list)
    # Long lines go on in the next, after a tab.
    for record in f"\n{text}".replace("\n\t", "").split("\nJob Id: ")[1:]:
        number = re.match(r"\d{1,18}", record)
        fields = dict(re.findall(r"^ {4}([\w.]+) = (.*)$", record, re.M))
        stamp = re.search(r"\bPILOT_STAMP=([\w.-]+)", fields.get("Variable_List", ""))
        state = fields.get("job_state", "")
        if number is None or stamp is None or state in ("", "C", "F", "X"):  # ended: its directory knows how
            continue
        comment = fields.get("comment", "on hold") if state == "H" else ""
        known = _PBS_STATES.get(state, "RUNNING")
        jobs[stamp[1]].append(Job(number[0], known, "", f"PBS: {comment}" if comment else ""))
    return jobs


# -- LSF


def _lsf(settings: BatchSettings, pilot: PilotAtCE) -> list[str]:
    return [
        *("bsub", "-rn", "-L", "/bin/sh"),
        *_given(J=name_of(pilot.stamp), o="/dev/null", e="/dev/null", q=settings.queue, P=settings.account),
        *_given(n=settings.cpus, M=settings.memory_mb, W=settings.wall_minutes),
    ]


def _lsf_find(stamp: str) -> str:
    # It fails for no job, too; any other failure leaves open whether there is one.
    asked = f"said=$(bjobs -a -noheader -o jobid -J {shlex.quote(name_of(stamp))} 2>&1)"
    return f"""{asked} || case $said in *'not found'*) exit 0 ;; *) exit 1 ;; esac; printf '%s\\n' "$said\""""


_LSF_STATES = {"PEND": "PENDING", "PSUSP": "PENDING", "WAIT": "PENDING", "DONE": "COMPLETED", "EXIT": "FAILED"}
_LSF_PLAIN = {"-", "", "New job is waiting for scheduling", "New job is waiting for scheduling;"}


def _lsf_jobs(text: str) -> Jobs:
    jobs: Jobs = defaultdict(list)
    for line in text.splitlines():
        fields = [field.strip() for field in line.split("|", 4)]
        if len(fields) == 5 and fields[0].isdecimal() and fields[2].startswith("p"):
            number, state, name, code, why = fields
            reason = f"LSF: {why}" if state in ("PEND", "PSUSP") and why not in _LSF_PLAIN else ""
            known = _LSF_STATES.get(state, "RUNNING")
            jobs[name[1:]].append(Job(number, known, code if code.isdecimal() else "", reason))
    return jobs


SYSTEMS = {
    "gridengine": BatchSystem(
        submit=_gridengine,
        number=r's/^\(Your job \)\{0,1\}\([0-9]\{1,18\}\)\( (".*") has been submitted\)\{0,1\}[[:space:]]*$/\2/p',
        variable="$JOB_ID",
        find=_gridengine_find,
        queue=["qstat", "-xml"],
        parse=_gridengine_jobs,
        cancel="qdel",
        words=SiteWords(
            quota=r"only \d+ jobs are allowed per user|no more than \d+ jobs|exceed\w* .*(per user|job limit)",
            # A warning before this is no refusal: such a job has been submitted.
            refusal=r"job was rejected|is not a \w+ value|unknown (option|resource)|unable to read script"
            r"|no suitable queues|invalid option|job rejected|denied: |does not exist",
        ),
    ),
    "pbs": BatchSystem(
        submit=_pbs,
        number=r"s/^\([0-9]\{1,18\}\)\(\.[A-Za-z0-9_.-]\{1,200\}\)\{0,1\}[[:space:]]*$/\1/p",
        variable="${PBS_JOBID%%[!0-9]*}",
        find=lambda stamp: f"exec qselect -N {shlex.quote(name_of(stamp)[:15])}",
        queue=["qstat", "-f"],
        parse=_pbs_jobs,
        cancel="qdel",
        words=SiteWords(
            quota=r"would exceed .*(limit|maximum)|maximum number of jobs",
            refusal=r"unknown (queue|resource)|unauthorized request|violates queue and/or server resource limits"
            r"|illegal (attribute|-\w+ value)|rejected by all possible destinations|invalid account|bad uid"
            r"|queue is not enabled|access to queue is denied|^usage: qsub|job rejected|would exceed",
        ),
    ),
    "lsf": BatchSystem(
        submit=_lsf,
        number=r"s/^\(Job <\)\{0,1\}\([0-9]\{1,18\}\)\(> is submitted to .*\)\{0,1\}$/\2/p",
        variable="$LSB_JOBID",
        find=_lsf_find,
        queue=["bjobs", "-a", "-noheader", "-o", "jobid stat name exit_code pend_reason delimiter='|'"],
        parse=_lsf_jobs,
        cancel="bkill",
        words=SiteWords(
            quota=r"(maximum|limit|threshold)\b.*\b(pending )?jobs?\b|pending job threshold|jobs? limit",
            refusal=r"no such (queue|user|project)|user cannot use the queue|request aborted by esub"
            r"|bad (resource requirement|argument)|illegal (option|job)|job not submitted",
        ),
        nothing=r"^no (unfinished |matching )?job found",
    ),
}
