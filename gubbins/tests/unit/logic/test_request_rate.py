"""Rate limits of requests."""

from __future__ import annotations

import pytest

from gubbins.domain.exceptions import TooManyReportsError
from gubbins.logic.my_pilots.request_rate import RequestRate


def test_a_client_that_is_refused_again_and_again_stays_refused_among_many_others() -> None:
    rate = RequestRate("address", per_minute=1)
    rate.admit("refused")
    for other in range(20_001):  # more than are tracked
        with pytest.raises(TooManyReportsError):
            rate.admit("refused")
        rate.admit(f"other {other}")
