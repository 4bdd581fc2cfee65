from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from diracx.tasks.plumbing.retry_policies import (
    MAX_DELAY,
    ExponentialBackoff,
    NoRetry,
    RetryPolicyBase,
)
from pydantic import BaseModel, ValidationError

FAILURE = RuntimeError("boom")


def delay(policy: RetryPolicyBase, attempt: int) -> float | None:
    before = datetime.now(UTC)
    when = policy.schedule_retry(attempt, FAILURE)
    after = datetime.now(UTC)
    if when is None:
        return None
    assert when.utcoffset() == timedelta(0)
    # The policy read the clock between the two readings; either bound gives the delay to within that.
    seconds = (when - after).total_seconds()
    assert (when - before).total_seconds() - seconds < 5
    return round(seconds, 0) if seconds > 1 else max(0.0, round(seconds, 1))


def test_no_retry_gives_up_at_once():
    assert NoRetry().schedule_retry(0, FAILURE) is None


def test_P31_max_retries_is_the_number_of_retries_and_base_the_first_delay():
    policy = ExponentialBackoff(base_delay_seconds=100, max_retries=3)
    assert [delay(policy, attempt) for attempt in range(5)] == [100, 200, 400, None, None]


def test_P31_published_defaults():
    policy = ExponentialBackoff()
    assert (policy.base_delay_seconds, policy.max_retries) == (10, 5)
    assert [delay(policy, attempt) for attempt in range(6)] == [10, 20, 40, 80, 160, None]


def test_zero_retries_is_no_retry_and_zero_delay_is_now():
    assert delay(ExponentialBackoff(max_retries=0), 0) is None
    assert delay(ExponentialBackoff(base_delay_seconds=0), 3) == 0


@pytest.mark.parametrize("attempt", [60, 1023, 5000, 10**9])
def test_a_huge_attempt_is_capped_and_does_not_overflow(attempt):
    policy = ExponentialBackoff(base_delay_seconds=1.5, max_retries=10**10)
    when = policy.schedule_retry(attempt, FAILURE)
    assert when is not None
    assert when - datetime.now(UTC) <= MAX_DELAY


@pytest.mark.parametrize(
    "fields",
    [
        {"base_delay_seconds": -1},
        {"base_delay_seconds": float("inf")},
        {"base_delay_seconds": float("nan")},
        {"max_retries": -1},
        {"max_retrys": 3},
    ],
)
def test_bad_settings_are_refused_at_their_definition(fields):
    with pytest.raises(ValidationError):
        ExponentialBackoff(**fields)


def test_P30_a_custom_policy_receives_the_real_exception():
    class OnlyTimeouts(RetryPolicyBase):
        wait_seconds: int = 5

        def schedule_retry(self, attempt: int, exception: Exception) -> datetime | None:
            if isinstance(exception, TimeoutError):
                return datetime.now(UTC) + timedelta(seconds=self.wait_seconds)
            return None

    assert OnlyTimeouts().schedule_retry(0, ValueError()) is None
    assert OnlyTimeouts(wait_seconds=1).schedule_retry(0, TimeoutError()) is not None


def test_policies_are_pydantic_models_and_compare_by_value():
    assert isinstance(NoRetry(), BaseModel)
    assert ExponentialBackoff(max_retries=2) == ExponentialBackoff(max_retries=2)
    with pytest.raises(TypeError):
        RetryPolicyBase()
