"""Parse errors of Slurm's commands: a refusal, or an unreachable controller."""

from __future__ import annotations

import re

from gubbins.domain.text import MAX_LINE_CHARS, one_line

_REFUSED = "Batch job submission failed: "
# The exit code is the same for a refusal and for an unreachable controller.
_UNREACHABLE = re.compile(
    r"contact|connect|communicat|timed out|zero bytes|authenticat|munge|standby|temporar|socket|transport", re.I
)
# Errors that sbatch finds before it contacts the controller.
_MISUSE = re.compile(
    r"unrecognized option|invalid|ambiguous|requires an argument|does not look like a batch script", re.I
)


def error_line(stderr: str) -> str:
    """The last error line of a command, without the command's name."""
    lines = [line for each in stderr.splitlines() if (line := one_line(each, len(each)))]
    if not lines:
        return "no message"
    return re.sub(r"^\w+: (error: |fatal: )?", "", lines[-1]).removeprefix(_REFUSED)[:MAX_LINE_CHARS]


def is_unreachable(stderr: str) -> bool:
    """Whether the controller was unreachable, so that nothing is known."""
    return _UNREACHABLE.search(error_line(stderr)) is not None


def is_refusal(stderr: str) -> bool:
    """Whether sbatch has refused the job for good."""
    return (_REFUSED in stderr or _MISUSE.search(stderr) is not None) and not is_unreachable(stderr)
