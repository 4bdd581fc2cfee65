"""Parse errors of Slurm's commands: a refusal, a quota, or an unreachable controller."""

from __future__ import annotations

import re

from gubbins.ces.judging import SiteWords
from gubbins.ces.protocol import SubmitOutcome
from gubbins.ces.transports.shell import Completed
from gubbins.domain.text import one_line

_FAILED = "Batch job submission failed: "
# What the controller has answered, of all errors that it knows.
WORDS = SiteWords(
    quota=r"\b(Assoc|QOS)(Max|Grp)Submit\w*Limit\b",
    refusal=r"^invalid (?!authentication|job credential)"
    r"|^(requested|duplicate|memory|node count|core count|cpu count|task (count|distribution)|time limit|switch"
    r"|burst buffer|container|multiple|cannot request|pathname|required) "
    r"|specification|(permission|access) denied|not permitted|violates accounting|more processors"
    r"|no partition specified|no eligible|is disabled|submissions disabled|not supported|needs to be provided"
    r"|impossible|breached|too many|DOS line breaks|I/O error writing script|^unspecified error",
)
# What sbatch says before it contacts the controller.
_MISUSE = SiteWords(
    quota=r"(?!)",
    refusal=r"unrecognized option|invalid (?!authentication|job credential)|ambiguous|requires an argument"
    r"|does not look like a batch script|cli_filter|DOS line breaks|unable to open file",
)
_HELP = re.compile(r"^Try .*--help", re.I)
_UNREACHABLE = re.compile(
    r"contact|connect|communicat|timed out|zero bytes|authenticat|munge|standby|temporar|socket|transport"
    r"|message receive|unexpected message",
    re.I,
)


def error_lines(done: Completed) -> list[str]:
    """The error lines of a command, without its name; where there are none, all that it has printed."""
    lines = [line for each in done.stderr.splitlines() if (line := one_line(each, len(each)))]
    errors = [line for line in lines if re.search(r"\berror:|\bfatal:", line)] or lines
    errors = errors or [line for each in done.stdout.splitlines() if (line := one_line(each, len(each)))]
    plain = (re.sub(r"^\w+: (error: |fatal: )?", "", line) for line in errors if not _HELP.match(line))
    return [*plain] or ["no message"]


def error_line(done: Completed) -> str:
    """All error lines of a command in one."""
    return one_line("; ".join(dict.fromkeys(line.removeprefix(_FAILED) for line in error_lines(done))))


def is_unreachable(done: Completed) -> bool:
    """True if the controller was unreachable, so that nothing is known."""
    return any(_UNREACHABLE.search(line) for line in error_lines(done))


def has_ended(done: Completed) -> bool:
    """True if all that scancel has to say is that jobs have ended in the meantime."""
    return all(re.search(r"already complet|invalid job id", line, re.I) for line in error_lines(done))


def submission_error(done: Completed) -> SubmitOutcome | None:
    """The outcome that sbatch reports as an error; None: nobody knows whether the job was submitted."""
    lines = error_lines(done)
    said = [line.removeprefix(_FAILED) for line in lines]
    decisive = [line.removeprefix(_FAILED) for line in lines if line.startswith(_FAILED)]
    if decisive:
        return WORDS.outcome(decisive[-1], said, name="Slurm")
    if is_unreachable(done):
        return None
    outcomes = (_MISUSE.outcome(line, said, name="Slurm") for line in said)
    return next((outcome for outcome in outcomes if outcome is not None), None)
