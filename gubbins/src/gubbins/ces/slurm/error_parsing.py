"""Classification of errors of Slurm's commands: refusal, quota, or unreachable controller."""

from __future__ import annotations

import re

from gubbins.ces.protocol import SubmitOutcome
from gubbins.ces.site_errors import SiteErrors
from gubbins.ces.transports.shell import Completed
from gubbins.domain.text import one_line

# Anywhere in a line, since wrappers may begin it with their own name.
_DECISIVE = re.compile(r"^.*Batch job submission failed: |^.*(?=cli_filter plugin terminated)")
# Errors reported by the controller.
SITE_ERRORS = SiteErrors(
    quota=r"\b(Assoc|QOS)(Max|Grp)Submit\w*Limit\b",
    refusal=r"^invalid (?!authentication|job credential)"
    r"|^(requested|duplicate|memory|node count|core count|cpu count|task (count|distribution)|time limit|switch"
    r"|burst buffer|container|multiple|cannot request|pathname|required) "
    r"|specification|(permission|access) denied|not permitted|violates accounting|more processors"
    r"|no partition specified|no eligible|is disabled|submissions disabled|not supported|needs to be provided"
    r"|impossible|breached|too many|DOS line breaks|I/O error writing script|^unspecified error"
    r"|^cli_filter plugin",
)
# Errors of sbatch before it contacts the controller.
_MISUSE = SiteErrors(
    quota=r"(?!)",
    refusal=r"unrecognized option|invalid (?!authentication|job credential)|ambiguous|requires an argument"
    r"|does not look like a batch script|DOS line breaks|unable to open file",
)
_HELP = re.compile(r"^Try .*--help", re.I)
_UNREACHABLE = re.compile(
    r"(to|not|n't) contact|contacting|connect|communicat|timed out|zero bytes|authenticat|munge|standby|temporar"
    r"|socket|transport|message receive|unexpected message",
    re.I,
)


def error_lines(done: Completed) -> list[str]:
    """Error lines of a command, without its name; or else all its output."""
    lines = [line for each in done.stderr.splitlines() if (line := one_line(each, len(each)))]
    errors = [line for line in lines if re.search(r"\berror:|\bfatal:", line)] or lines
    errors = errors or [line for each in done.stdout.splitlines() if (line := one_line(each, len(each)))]
    plain = (re.sub(r"^\w+: (error: |fatal: )?", "", line) for line in errors if not _HELP.match(line))
    return [*plain] or ["no message"]


def error_line(done: Completed) -> str:
    """Join the error lines of a command."""
    return one_line("; ".join(dict.fromkeys(_DECISIVE.sub("", line) for line in error_lines(done))))


def is_unreachable(done: Completed) -> bool:
    """True if the controller was unreachable; warnings do not say so."""
    return any(_UNREACHABLE.search(line) and "warning" not in line.lower() for line in error_lines(done))


def has_ended(done: Completed) -> bool:
    """True if scancel reports only that jobs have ended meanwhile."""
    return all(re.search(r"already complet|invalid job id", line, re.I) for line in error_lines(done))


def submission_error(done: Completed) -> SubmitOutcome | None:
    """Classify an error of sbatch; None: the job may have been submitted."""
    lines = error_lines(done)
    messages = [_DECISIVE.sub("", line) for line in lines]
    decisive = [message for line, message in zip(lines, messages, strict=True) if _DECISIVE.match(line)]
    if decisive:
        return SITE_ERRORS.outcome(decisive[-1], messages, name="Slurm")
    if is_unreachable(done):
        return None
    outcomes = (_MISUSE.outcome(line, messages, name="Slurm") for line in messages)
    return next((outcome for outcome in outcomes if outcome is not None), None)
