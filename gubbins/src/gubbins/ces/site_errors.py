"""Classification of error messages of a submission: refusal, quota, or unknown outcome.

Each back end defines the patterns of its kind of site; after any other error the pilot may have been submitted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from gubbins.domain.text import one_line

from .protocol import SubmitOutcome


class SiteErrors(NamedTuple):
    """Patterns of error messages of a kind of site, as case-insensitive regular expressions."""

    quota: str
    """The site refuses more of our pilots, which is not a failure of the site."""
    refusal: str
    """The pilot was definitely not accepted."""

    def outcome(self, decisive: str, messages: Iterable[str] = (), *, name: str = "") -> SubmitOutcome | None:
        """Classify a failed submission; None: the outcome is not known.

        Args:
            decisive: the line with the error.
            messages: all lines; they become the error message, and may name the quota.
            name: name of the site's software, for the error message.
        """
        lines = [*messages] or [decisive]
        refused = re.search(self.refusal, decisive, re.IGNORECASE) is not None
        quota_lines = [decisive, *lines] if refused else [decisive]
        quota = any(re.search(self.quota, line, re.IGNORECASE) for line in quota_lines)
        if not refused and not quota:
            return None
        text = one_line("; ".join(dict.fromkeys(lines))) or "no reason given"
        return SubmitOutcome(error=f"{name}: {text}" if name else text, quota=quota)
