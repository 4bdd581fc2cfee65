"""Schedules in zones whose clocks are changed: by an hour, by half an hour, at midnight, or by a whole day."""

from __future__ import annotations

import itertools
from datetime import UTC, date, datetime, time, timedelta
from functools import cache
from zoneinfo import ZoneInfo

import pytest
from diracx.tasks.plumbing.schedules import CronSchedule, RRuleSchedule, TaskScheduleBase
from hypothesis import example, given, settings
from hypothesis import strategies as st

ZONES = [
    "Europe/Zurich",
    "America/New_York",
    "Australia/Lord_Howe",  # by half an hour
    "Pacific/Chatham",  # at 2:45
    "Pacific/Apia",  # without 30 December 2011
    "America/Havana",  # at midnight
    "America/Sao_Paulo",  # at midnight, until 2019
    "Asia/Beirut",  # at midnight, so that 23:00 comes twice
    "Asia/Pyongyang",  # by half an hour, once
    "Antarctica/Troll",  # by two hours
    "Africa/Casablanca",  # back for Ramadan
    "Europe/Dublin",  # winter time is the exception
]


@cache
def changes(zone: ZoneInfo) -> list[datetime]:
    """Times of past and future clock changes."""
    moment, step, found = datetime(1997, 1, 1, tzinfo=UTC), timedelta(minutes=15), []
    while moment.year < 2031:
        there = moment + timedelta(days=10)
        if moment.astimezone(zone).utcoffset() != there.astimezone(zone).utcoffset():
            change = moment
            while change.astimezone(zone).utcoffset() == moment.astimezone(zone).utcoffset():
                change += step
            found.append(change)
        moment = there
    return found


ALL_CHANGES = [(name, change) for name in ZONES for change in changes(ZoneInfo(name))]
any_change = st.sampled_from(ALL_CHANGES)


def around(schedule: TaskScheduleBase, change: datetime, days: float = 1.5) -> list[datetime]:
    """All occurrences within some days of a change of the clocks."""
    moment, end = change - timedelta(days=days), change + timedelta(days=days)
    found: list[datetime] = []
    while (moment := schedule.next_after(moment)) <= end:
        assert not found or moment > found[-1]
        found.append(moment)
    return found


@given(
    change=any_change,
    rhythm=st.sampled_from(
        [
            ("*/5 * * * *", 5),
            ("*/20 * * * *", 20),
            ("0,30 * * * *", 30),
            ("17 * * * *", 60),
            ("@hourly", 60),
            ("0 0-23 * * *", 60),
            ("0 */2 * * *", 120),
            ("30 1-23/2 * * *", 120),
            ("45 */3 * * *", 180),
            ("0 */6 * * *", 360),
        ]
    ),
)
@example(("Europe/Zurich", datetime(2026, 10, 25, 1, tzinfo=UTC)), ("0 1-23/2 * * *", 120))
@settings(max_examples=150, deadline=None)
def test_a_cron_expression_that_goes_round_the_clock_never_pauses_longer_than_its_period(change, rhythm):
    (zone, moment), (expression, minutes) = change, rhythm
    found = around(CronSchedule(expression, timezone=zone), moment, days=max(0.3, minutes / 700))
    assert max(b - a for a, b in itertools.pairwise(found)) <= timedelta(minutes=minutes)


@given(
    change=any_change,
    rhythm=st.sampled_from(
        [
            ("FREQ=MINUTELY;INTERVAL=5", 5),
            ("FREQ=MINUTELY;INTERVAL=7", 7),
            ("FREQ=HOURLY", 60),
            ("FREQ=HOURLY;INTERVAL=5", 300),
            ("FREQ=SECONDLY;INTERVAL=1111", 1111 / 60),
            ("DTSTART:20260329T023000\nRRULE:FREQ=MINUTELY;INTERVAL=90", 90),
        ]
    ),
)
@settings(max_examples=100, deadline=None)
def test_a_recurrence_rule_by_the_hour_or_faster_counts_real_time(change, rhythm):
    (zone, moment), (rule, minutes) = change, rhythm
    if rule.startswith("DTSTART"):
        moment = max(moment, datetime(2026, 4, 2, tzinfo=UTC))
    found = around(RRuleSchedule(rule, timezone=zone), moment)
    assert {b - a for a, b in itertools.pairwise(found)} == {timedelta(minutes=minutes)}


@given(
    change=any_change,
    rule=st.sampled_from(
        ["FREQ=HOURLY;BYMINUTE=0", "FREQ=MINUTELY;BYSECOND=30;INTERVAL=15", "FREQ=MINUTELY;BYMINUTE=0"]
    ),
)
@settings(max_examples=60, deadline=None)
def test_a_recurrence_rule_that_names_minutes_does_not_pause_longer_either(change, rule):
    found = around(RRuleSchedule(rule, timezone=change[0]), change[1])
    usual = timedelta(minutes=15 if "INTERVAL" in rule else 60)
    assert max(b - a for a, b in itertools.pairwise(found)) <= usual


def once_a_day(zone: str, at: time, around_day: date) -> list[datetime]:
    """By PEP 495: what does not exist has the offset of before the change, what comes twice is the first."""
    days = (around_day + timedelta(days=n) for n in range(-4, 5))
    return sorted({datetime.combine(day, at, ZoneInfo(zone)).astimezone(UTC) for day in days})


@given(
    change=any_change,
    at=st.times().map(lambda at: time(at.hour, at.minute)),
    write=st.sampled_from(
        [
            lambda at, zone: CronSchedule(f"{at.minute} {at.hour} * * *", timezone=zone),
            lambda at, zone: RRuleSchedule(
                f"FREQ=DAILY;BYHOUR={at.hour};BYMINUTE={at.minute};BYSECOND=0", timezone=zone
            ),
            lambda at, zone: RRuleSchedule(
                f"DTSTART;TZID={zone}:19970101T{at:%H%M}00\nRRULE:FREQ=DAILY;INTERVAL=1"
            ),
        ]
    ),
)
@example(
    ("Europe/Zurich", datetime(2026, 10, 25, 1, tzinfo=UTC)),
    time(3),
    lambda at, zone: CronSchedule("0 3 * * *", timezone=zone),
)
@example(
    ("Europe/Zurich", datetime(2026, 3, 29, 1, tzinfo=UTC)),
    time(2, 30),
    lambda at, zone: CronSchedule("30 2 * * *", timezone=zone),
)
@example(
    ("Pacific/Apia", datetime(2011, 12, 30, 10, tzinfo=UTC)),
    time(6),
    lambda at, zone: CronSchedule("0 6 * * *", timezone=zone),
)
@settings(max_examples=300, deadline=None)
def test_a_daily_schedule_runs_exactly_once_a_day(change, at, write):
    zone, moment = change
    found = around(write(at, zone), moment)
    expected = once_a_day(zone, at, moment.astimezone(ZoneInfo(zone)).date())
    assert found == [when for when in expected if -1.5 < (when - moment) / timedelta(days=1) <= 1.5]


@given(
    change=any_change,
    expression=st.sampled_from(
        ["*/5 3-5 * * *", "*/20 0-22 * * *", "15,45 1,2,3 * * *", "*/10 2 * * *", "0 2,14 * * *"]
    ),
    hours=st.floats(-30, 30),
)
@settings(max_examples=200, deadline=None)
def test_the_next_occurrence_does_not_depend_on_the_start_of_the_search(change, expression, hours):
    schedule = CronSchedule(expression, timezone=change[0])
    requested = change[1] + timedelta(hours=hours)
    found = schedule.next_after(requested)
    assert found > requested
    assert schedule.next_after(found - timedelta(microseconds=1)) == found
    assert schedule.next_after(requested + (found - requested) / 2) == found


class TestTheNightsOfZurich:
    """Clock changes in Zurich: 25 October 2026 has 2:00 twice, 29 March has it not at all."""

    BACK, FORWARD = datetime(2026, 10, 25, 1, tzinfo=UTC), datetime(2026, 3, 29, 1, tzinfo=UTC)

    def local(self, expression: str, change: datetime) -> list[str]:
        schedule = CronSchedule(expression, timezone="Europe/Zurich")
        found = around(schedule, change, days=0.2)
        return [f"{when.astimezone(ZoneInfo('Europe/Zurich')):%H:%M}" for when in found]

    def test_a_range_of_hours_continues_through_the_repeated_hour(self):
        found = around(CronSchedule("*/5 0-22 * * *", timezone="Europe/Zurich"), self.BACK, days=0.15)
        assert {b - a for a, b in itertools.pairwise(found)} == {timedelta(minutes=5)}

    @pytest.mark.parametrize(
        ("expression", "times"),
        [
            ("0 2 * * *", ["02:00"]),
            ("0 3 * * *", ["03:00"]),
            ("0 2,3,4 * * *", ["02:00", "03:00", "04:00"]),
            ("0 2-4 * * *", ["02:00", "02:00", "03:00", "04:00"]),
            ("*/30 3-4 * * *", ["03:00", "03:30", "04:00", "04:30"]),
            ("*/30 2 * * *", ["02:00", "02:30", "02:00", "02:30"]),
        ],
    )
    def test_named_hours_run_once_when_the_clocks_go_back_and_ranges_keep_to_their_hours(self, expression, times):
        assert self.local(expression, self.BACK) == times

    @pytest.mark.parametrize(
        ("expression", "times"),
        [("30 2 * * *", ["03:30"]), ("0 2,3 * * *", ["03:00"]), ("0 1-4 * * *", ["01:00", "03:00", "04:00"])],
    )
    def test_a_run_in_the_skipped_hour_happens_once(self, expression, times):
        assert self.local(expression, self.FORWARD) == times


class TestYearsAhead:
    """A schedule that begins, or is named, many years from now is a schedule."""

    @pytest.mark.parametrize(
        ("schedule", "first"),
        [
            (CronSchedule("0 0 1 1 * 0 2050"), datetime(2050, 1, 1, tzinfo=UTC)),
            (CronSchedule("0 12 29 2 * 0 2096"), datetime(2096, 2, 29, 12, tzinfo=UTC)),
            (CronSchedule("0 6 1 7 * 0 2099", timezone="Europe/Zurich"), datetime(2099, 7, 1, 4, tzinfo=UTC)),
            (
                RRuleSchedule("DTSTART:20880101T000000Z\nRRULE:FREQ=MINUTELY;INTERVAL=7"),
                datetime(2088, 1, 1, tzinfo=UTC),
            ),
            (
                RRuleSchedule("DTSTART;TZID=Europe/Zurich:20880701T060000\nRRULE:FREQ=HOURLY"),
                datetime(2088, 7, 1, 4, tzinfo=UTC),
            ),
            (RRuleSchedule("FREQ=YEARLY;INTERVAL=100;BYYEARDAY=366"), datetime(2096, 12, 31, tzinfo=UTC)),
        ],
    )
    def test_the_first_run_is_found_years_ahead(self, schedule, first):
        assert schedule.next_after(datetime(2026, 1, 1, tzinfo=UTC)) == first

    @pytest.mark.parametrize("expression", ["0 0 30 2 *", "0 0 29 2 * 0 2099"])
    def test_an_impossible_date_is_refused(self, expression):
        with pytest.raises(ValueError, match="failed to find next date"):
            CronSchedule(expression)


@given(
    change=any_change,
    later=st.integers(0, 40),
    times=st.sampled_from(["*/20 *", "0 *", "30 */2", "0 8-18", "15 */6"]),
    fraction=st.floats(0, 1),
)
@example(("Europe/Zurich", datetime(2026, 10, 25, 1, tzinfo=UTC)), 1, "*/20 *", 0.5)
@example(("Europe/Zurich", datetime(2026, 10, 25, 1, tzinfo=UTC)), 0, "*/20 *", 0.5)
@example(("Antarctica/Troll", datetime(2026, 10, 25, 1, tzinfo=UTC)), 1, "15 */6", 0.0)
@settings(max_examples=150, deadline=None)
def test_a_schedule_of_some_days_runs_on_no_other_day(change, later, times, fraction):
    (zone, moment) = change
    there = ZoneInfo(zone)
    day = (moment.astimezone(there) + timedelta(days=later)).date()
    cron = CronSchedule(f"{times} {day.day} {day.month} *", timezone=zone)
    rules = [cron]
    if times.endswith(" *"):
        rule = f"FREQ=MINUTELY;INTERVAL=20;BYMONTH={day.month};BYMONTHDAY={day.day}"
        rules.append(RRuleSchedule(rule, timezone=zone))
    for schedule in rules:
        occurrence = schedule.next_after(moment - timedelta(days=2 * fraction))
        local = occurrence.astimezone(there)
        assert (local.day, local.month) == (day.day, day.month), schedule
