"""What Slurm's commands complain about: a refusal, or that nobody was there."""

from __future__ import annotations

__all__ = ["complaint", "is_refusal", "is_silence"]

import re

from gubbins.domain.text import MAX_LINE_CHARS, one_line

_REFUSED = "Batch job submission failed: "
# The same exit code says that the controller has said no, and that it has said nothing.
_SILENCE = re.compile(
    r"contact|connect|communicat|timed out|zero bytes|authenticat|munge|standby|temporar|socket|transport", re.I
)
# What sbatch finds wrong before it asks anybody.
_MISUSE = re.compile(
    r"unrecognized option|invalid|ambiguous|requires an argument|does not look like a batch script", re.I
)


def complaint(stderr: str) -> str:
    """The last line that a command has complained with, without its name."""
    lines = [line for each in stderr.splitlines() if (line := one_line(each, len(each)))]
    if not lines:
        return "no message"
    return re.sub(r"^\w+: (error: |fatal: )?", "", lines[-1]).removeprefix(_REFUSED)[:MAX_LINE_CHARS]


def is_silence(stderr: str) -> bool:
    """Whether the controller could not be asked, so that nothing is known."""
    return _SILENCE.search(complaint(stderr)) is not None


def is_refusal(stderr: str) -> bool:
    """Whether sbatch says that there is no such job, and will not be."""
    return (_REFUSED in stderr or _MISUSE.search(stderr) is not None) and not is_silence(stderr)
