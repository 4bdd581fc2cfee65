"""Judge what a site says about a submission: a refusal, its quota, or nothing that one can know.

Each back end brings the words of its kind of site; what is none of them may have come through.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from gubbins.domain.text import one_line

from .protocol import SubmitOutcome


class SiteWords(NamedTuple):
    """Words of a kind of site, as regular expressions, in any case."""

    quota: str
    """No more of our pilots now: no failure of the site."""
    refusal: str
    """The pilot was definitely not taken."""

    def outcome(self, decisive: str, said: Iterable[str] = (), *, name: str = "") -> SubmitOutcome | None:
        """The outcome of a submission that went wrong; None: nobody knows.

        Args:
            decisive: the line that says what became of it.
            said: all lines; they are the message, and may name the quota.
            name: of the site's software, for the message.
        """
        lines = [*said] or [decisive]
        refused = re.search(self.refusal, decisive, re.IGNORECASE) is not None
        may_name_it = [decisive, *lines] if refused else [decisive]
        quota = any(re.search(self.quota, line, re.IGNORECASE) for line in may_name_it)
        if not refused and not quota:
            return None
        words = one_line("; ".join(dict.fromkeys(lines))) or "no reason given"
        return SubmitOutcome(error=f"{name}: {words}" if name else words, quota=quota)
