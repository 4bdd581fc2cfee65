"""Agenda of the leader: deferred schedules."""

from __future__ import annotations

from diracx.tasks.plumbing.broker.requests import Occurrence
from diracx.tasks.plumbing.scheduler.agenda import Agenda


def test_a_schedule_that_could_not_be_prepared_at_first_is_taken_once_when_it_is_due():
    broken = True

    def make(schedule: str, due_ms: int) -> Occurrence:
        if broken:
            raise ValueError("its arguments cannot be made")
        return {"id": schedule, "due": due_ms, "stream": "stream", "task": "task", "data": b""}

    agenda = Agenda(make, lambda schedule, _: agenda.defer(schedule, 0))
    agenda.load([("test:Hourly", 5000), ("test:Daily", 7000)])
    assert not agenda.prepare(1)
    broken = False
    assert sorted(agenda.requeue()) == ["test:Daily", "test:Hourly"]
    assert [each["id"] for each in agenda.take_due(6000, 10, 1)] == ["test:Hourly"]
