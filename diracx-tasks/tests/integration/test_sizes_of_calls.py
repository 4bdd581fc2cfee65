"""Costs of calls are independent of the amount of data. `make bench-size` measures the full size."""

from __future__ import annotations

import pytest

from benchmarks.size import STATES, State, most_work

#: More than any call takes at once: twice as many must make no difference.
ITEMS = 600
SLACK = 5
#: What keeps the server busy for up to 5 ms.
MOST = 1700
#: What grows with the number of workers, once and by a µs for each (ADR 67); and what would fill the memory here:
#: see test_large_messages.py.
LEFT_OUT = {"workers after the server was away", "messages of 1 MB"}


@pytest.mark.leaves_keys("*")
@pytest.mark.parametrize(
    "state", [state for state in STATES if state.name not in LEFT_OUT], ids=lambda state: state.name
)
async def test_one_call_does_no_more_when_there_is_twice_as_much(state: State, redis_url: str, redis) -> None:
    fewer, _ = await most_work(state, ITEMS, redis_url)
    await redis.flushall()
    more, call = await most_work(state, 2 * ITEMS, redis_url)
    assert more <= fewer + SLACK, f"{call}: {fewer} steps with {ITEMS}, {more} with twice as many"
    assert more <= MOST, call
