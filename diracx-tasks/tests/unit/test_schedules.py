from __future__ import annotations

import itertools
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta, timezone

import pytest
from dateutil.rrule import rrulestr
from diracx.tasks.plumbing.schedules import (
    RRULE_ANCHOR,
    CronSchedule,
    IntervalSeconds,
    RRuleSchedule,
    TaskScheduleBase,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def utc(*args: int) -> datetime:
    return datetime(*args, tzinfo=UTC)


def series(schedule: TaskScheduleBase, start: datetime, n: int) -> list[datetime]:
    found = []
    for _ in range(n):
        start = schedule.next_after(start)
        found.append(start)
    return found


SEED_SCHEDULES = [
    IntervalSeconds(seconds=3600),
    CronSchedule("0 6 * * *"),
    CronSchedule("*/15 * * * *"),
    CronSchedule("0 0 * * 0"),
    RRuleSchedule("FREQ=WEEKLY;BYDAY=FR"),
    RRuleSchedule("FREQ=HOURLY;INTERVAL=2"),
    RRuleSchedule("FREQ=MONTHLY;BYDAY=-1FR"),
]


@pytest.mark.parametrize("schedule", SEED_SCHEDULES, ids=repr)
def test_every_schedule_of_the_seed_is_aware_utc_and_in_the_future(schedule):
    found = schedule.next_occurrence()
    assert found.utcoffset() == timedelta(0)
    assert found.tzinfo is UTC
    assert found > datetime.now(UTC)


@pytest.mark.parametrize("schedule", SEED_SCHEDULES, ids=repr)
@given(moment=st.datetimes(datetime(1996, 2, 1), datetime(2080, 1, 1), timezones=st.just(UTC)))
@settings(max_examples=50, deadline=None)
def test_next_after_is_strictly_after_and_has_no_gap(schedule, moment):
    found = schedule.next_after(moment)
    assert found > moment
    if not isinstance(schedule, IntervalSeconds):
        # Asked just before the occurrence that was found, it is found again.
        assert schedule.next_after(found - timedelta(microseconds=1)) == found


def test_schedules_have_the_attributes_of_the_contract():
    assert IntervalSeconds(60).seconds == 60
    assert CronSchedule("0 * * * *").expression == "0 * * * *"
    assert RRuleSchedule("FREQ=DAILY").rule == "FREQ=DAILY"


class TestInterval:
    def test_P40_keeps_its_phase(self):
        start = utc(2026, 1, 1)
        assert series(IntervalSeconds(3), start, 3) == [start + timedelta(seconds=3 * n) for n in (1, 2, 3)]

    def test_an_interval_of_a_fraction_of_a_second_is_kept(self):
        assert IntervalSeconds(0.25).next_after(utc(2026, 1, 1)) == utc(2026, 1, 1) + timedelta(seconds=0.25)

    @pytest.mark.parametrize(
        "seconds", [0, -1, float("nan"), float("inf"), 1e300, 10**400, 1e-9, 0.0009, "60", None, True]
    )
    def test_anything_but_a_positive_number_is_refused(self, seconds):
        with pytest.raises(ValueError, match="seconds"):
            IntervalSeconds(seconds)


class TestCron:
    def test_is_read_in_utc_whatever_the_zone_of_the_moment(self):
        moment = datetime(2026, 7, 1, 7, 30, tzinfo=timezone(timedelta(hours=2)))
        assert CronSchedule("0 6 * * *").next_after(moment) == utc(2026, 7, 1, 6)

    def test_a_zone_of_its_own(self):
        schedule = CronSchedule("0 6 * * *", timezone="Europe/Zurich")
        assert schedule.next_after(utc(2026, 1, 10)) == utc(2026, 1, 10, 5)
        assert schedule.next_after(utc(2026, 7, 10)) == utc(2026, 7, 10, 4)

    def test_fixed_hours_fire_once_when_the_clocks_go_back(self):
        schedule = CronSchedule("30 2 * * *", timezone="Europe/Zurich")
        expected = [utc(2026, 10, 25, 0, 30), utc(2026, 10, 26, 1, 30)]
        assert series(schedule, utc(2026, 10, 24, 12), 2) == expected

    def test_every_half_hour_continues_through_the_repeated_hour(self):
        schedule = CronSchedule("*/30 * * * *", timezone="Europe/Zurich")
        start = utc(2026, 10, 24, 23)
        assert series(schedule, start, 8) == [start + timedelta(minutes=30 * n) for n in range(1, 9)]

    def test_fixed_hours_fire_when_the_clocks_skip_them(self):
        schedule = CronSchedule("30 2 * * *", timezone="Europe/Zurich")
        assert [when.day for when in series(schedule, utc(2026, 3, 28, 12), 2)] == [29, 30]

    @pytest.mark.parametrize(
        "expression", ["", "bad", "61 * * * *", "* * * *", "0 0 30 2 *", "R * * * *", "H * * * *", 5, None]
    )
    def test_an_invalid_expression_is_refused_at_its_definition_and_named(self, expression):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at below
            CronSchedule(expression)
        assert repr(expression) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("written", "same"),
        [
            ("0 9-9 * * *", "0 9 * * *"),
            ("5-5/20 09-9 * * *", "5 9 * * *"),
            ("0 0 1-1 * MON,Fri-fri", "0 0 1 * mon,fri"),
            ("0 0 * * 0-0,6", "0 0 * * 0,6"),
            ("0 0 1-10 10-10 * 0-0 2030-2030", "0 0 1-10 10 * 0 2030"),
        ],
    )
    def test_a_range_of_one_value_is_that_value(self, written, same):
        assert series(CronSchedule(written), utc(2026, 1, 1), 5) == series(CronSchedule(same), utc(2026, 1, 1), 5)
        assert CronSchedule(written).expression == written

    def test_an_unknown_zone_is_refused_and_named(self):
        with pytest.raises(ValueError, match="Europe/Atlantis"):
            CronSchedule("0 0 * * *", timezone="Europe/Atlantis")

    def test_an_exhausted_expression_is_a_clear_error(self):
        with pytest.raises(ValueError, match="no occurrence after"):
            CronSchedule("0 0 1 1 * 0 2020").next_occurrence()


class TestRRule:
    def test_P44_interval_is_honoured_across_calls(self):
        found = series(RRuleSchedule("FREQ=HOURLY;INTERVAL=2"), utc(2026, 1, 1, 0, 30), 100)
        assert {b - a for a, b in itertools.pairwise(found)} == {timedelta(hours=2)}

    def test_P44_interval_is_honoured_across_restarts(self):
        program = (
            "from datetime import *; from diracx.tasks.plumbing.schedules import RRuleSchedule as R;"
            "print(R('FREQ=DAILY;INTERVAL=2').next_after(datetime(2026, 5, {day}, 12, tzinfo=UTC)))"
        )

        def run(day: int) -> str:
            done = subprocess.run(
                [sys.executable, "-c", program.format(day=day)], check=True, capture_output=True, text=True
            )
            return done.stdout.strip()

        first = [run(day) for day in (1, 2, 3)]
        assert len(set(first)) == 2
        assert first == [run(day) for day in (1, 2, 3)]

    def test_P44_an_exhausted_schedule_raises_value_error_only_when_used(self):
        for rule in (
            "FREQ=DAILY;UNTIL=20200101T000000Z",
            "FREQ=DAILY;UNTIL=19900101T000000Z",
            "DTSTART:20200101T000000Z\nRRULE:FREQ=DAILY;COUNT=3",
        ):
            schedule = RRuleSchedule(rule)
            with pytest.raises(ValueError, match="no occurrence after"):
                schedule.next_occurrence()

    def test_count_without_dtstart_is_an_exhausted_schedule_with_the_reason(self):
        schedule = RRuleSchedule("FREQ=DAILY;COUNT=2")
        assert schedule.lacks_dtstart
        with pytest.raises(ValueError, match="COUNT counts from DTSTART"):
            schedule.next_occurrence()

    def test_count_with_dtstart_ends_after_that_many(self):
        schedule = RRuleSchedule("DTSTART:20260101T000000Z\nRRULE:FREQ=DAILY;COUNT=2")
        assert series(schedule, utc(2025, 12, 31), 2) == [utc(2026, 1, 1), utc(2026, 1, 2)]
        with pytest.raises(ValueError, match="no occurrence"):
            schedule.next_after(utc(2026, 1, 2))

    def test_omitted_parts_of_a_rule_are_the_start_of_the_period(self):
        moment = utc(2026, 5, 6, 7, 8, 9)
        assert RRuleSchedule("FREQ=YEARLY").next_after(moment) == utc(2027, 1, 1)
        assert RRuleSchedule("FREQ=MONTHLY").next_after(moment) == utc(2026, 6, 1)
        assert RRuleSchedule("FREQ=WEEKLY").next_after(moment) == utc(2026, 5, 11)
        assert RRuleSchedule("FREQ=WEEKLY;BYDAY=FR").next_after(moment) == utc(2026, 5, 8)
        assert RRuleSchedule("FREQ=MONTHLY;BYDAY=-1FR").next_after(moment) == utc(2026, 5, 29)

    def test_dtstart_in_a_zone_follows_its_clock(self):
        schedule = RRuleSchedule("DTSTART;TZID=Europe/Zurich:20260101T060000\nRRULE:FREQ=DAILY")
        assert schedule.next_after(utc(2026, 1, 10)) == utc(2026, 1, 10, 5)
        assert schedule.next_after(utc(2026, 7, 10)) == utc(2026, 7, 10, 4)

    def test_a_rule_may_name_a_zone_beside_it_and_follows_its_clock(self):
        schedule = RRuleSchedule("FREQ=DAILY;BYHOUR=6;BYMINUTE=0;BYSECOND=0", timezone="Europe/Zurich")
        assert schedule.next_after(utc(2026, 1, 10)) == utc(2026, 1, 10, 5)
        assert schedule.next_after(utc(2026, 7, 10)) == utc(2026, 7, 10, 4)
        assert schedule.fingerprint.startswith("rrule@Europe/Zurich:FREQ=DAILY")
        assert schedule != RRuleSchedule(schedule.rule)
        local = RRuleSchedule("DTSTART:20260101T060000\nRRULE:FREQ=DAILY;COUNT=2", timezone="Europe/Zurich")
        assert series(local, utc(2025, 12, 31), 2) == [utc(2026, 1, 1, 5), utc(2026, 1, 2, 5)]

    def test_an_hourly_rule_in_a_time_zone_works_across_clock_changes(self):
        schedule = RRuleSchedule("FREQ=HOURLY", timezone="Europe/Zurich")
        for day in (utc(2026, 3, 28, 20), utc(2026, 10, 24, 20)):
            found = series(schedule, day, 12)
            assert all(timedelta(0) < b - a <= timedelta(hours=2) for a, b in itertools.pairwise(found))

    @pytest.mark.parametrize(
        ("rule", "message"),
        [
            ("DTSTART:20260101T060000Z\nRRULE:FREQ=DAILY", "has a time zone"),
            ("DTSTART;TZID=Europe/Rome:20260101T060000\nRRULE:FREQ=DAILY", "has a time zone"),
            ("FREQ=DAILY;UNTIL=20270101T000000", "UNTIL values must be specified in UTC"),
            ("RRULE:FREQ=DAILY\nEXDATE:20260102T000000", "give all its dates a time zone"),
        ],
    )
    def test_a_zone_that_does_not_go_with_the_dates_is_refused(self, rule, message):
        RRuleSchedule(rule)
        with pytest.raises(ValueError, match=message):
            RRuleSchedule(rule, timezone="Europe/Zurich")

    def test_excluded_dates_are_left_out(self):
        schedule = RRuleSchedule("RRULE:FREQ=DAILY\nEXDATE:20260102T000000Z")
        assert schedule.next_after(utc(2026, 1, 1)) == utc(2026, 1, 3)

    @pytest.mark.parametrize(
        "rule",
        [
            "FREQ=SECONDLY;INTERVAL=7",
            "RRULE:FREQ=SECONDLY\nRRULE:FREQ=MONTHLY",
            "RRULE:FREQ=MINUTELY\nEXRULE:FREQ=DAILY;BYHOUR=3\nEXDATE:20260101T000100Z",
            "RRULE:FREQ=MINUTELY\nRDATE:20260101T000030Z",
        ],
    )
    def test_next_run_of_a_rule_by_the_second_or_minute_is_found_at_once(self, rule):
        schedule = RRuleSchedule(rule)
        started = time.process_time()
        series(schedule, utc(2026, 1, 1), 2)
        assert time.process_time() - started < 2

    @pytest.mark.parametrize(
        ("rule", "message"),
        [
            ("FREQ=MINUTELY;BYMONTH=2;BYMONTHDAY=30", "no date matches it"),
            ("FREQ=SECONDLY;BYWEEKNO=54;UNTIL=20400101T000000Z", "no date matches it"),
            ("RRULE:FREQ=DAILY\nRRULE:FREQ=DAILY;BYYEARDAY=366;BYMONTH=1", "no date matches it"),
            ("FREQ=HOURLY;INTERVAL=2;BYMONTH=2;BYMONTHDAY=30", "no date matches it"),
            ("FREQ=SECONDLY;INTERVAL=4;BYHOUR=0,12;BYMONTH=2;BYMONTHDAY=30", "no date matches it"),
            ("RRULE:FREQ=SECONDLY\nEXRULE:FREQ=SECONDLY", "excludes too much"),
            ("RRULE:FREQ=DAILY\nEXRULE:FREQ=SECONDLY;INTERVAL=2", "excludes too much"),
            ("FREQ=SECONDLY;BYSETPOS=2", "no date matches it"),
            ("FREQ=HOURLY;BYMINUTE=0,30;BYSETPOS=3,-3", "no date matches it"),
            ("DTSTART:20200101T000000Z\nRRULE:FREQ=MINUTELY;COUNT=100000000", "use UNTIL instead"),
            ("FREQ=DAILY;INTERVAL=99999999999999", "INTERVAL must be"),
        ],
    )
    def test_a_rule_that_would_occupy_the_scheduler_for_minutes_is_refused(self, rule, message):
        started = time.process_time()
        with pytest.raises(ValueError, match=message):
            RRuleSchedule(rule)
        assert time.process_time() - started < 20

    @pytest.mark.parametrize(
        "rule", ["FREQ=DAILY;BYMONTH=2;BYMONTHDAY=29", "FREQ=HOURLY;BYMINUTE=0,30;BYSETPOS=2"]
    )
    def test_a_rare_rule_is_not_refused(self, rule):
        moment = utc(2026, 3, 1)
        expected = rrulestr(rule, dtstart=RRULE_ANCHOR).after(moment.replace(tzinfo=None))
        assert RRuleSchedule(rule).next_after(moment) == expected.replace(tzinfo=UTC)

    @pytest.mark.parametrize(
        "rule",
        [
            "RRULE:FREQ=WEEKLY;INTERVAL=3\nRRULE:FREQ=MONTHLY;BYMONTHDAY=15\nEXRULE:FREQ=MONTHLY;BYDAY=1MO",
            "rrule:freq=daily;interval=5\nexrule:freq=weekly;byday=su\nRDATE:20260301T100000",
            "RRULE:FREQ=DAILY;INTERVAL=2;BYHOUR=1,2\nRRULE:FREQ=WEEKLY;COUNT=1570\nEXDATE:20260102T000000",
        ],
    )
    def test_several_rules_have_the_occurrences_of_all(self, rule):
        expected = rrulestr(rule, dtstart=RRULE_ANCHOR).between(datetime(2026, 1, 1), datetime(2026, 6, 1))
        found = series(RRuleSchedule(rule), utc(2026, 1, 1), len(expected))
        assert found == [moment.replace(tzinfo=UTC) for moment in expected]

    @pytest.mark.parametrize(
        "rule",
        [
            "",
            "bad",
            "FREQ=NOPE",
            "INTERVAL=2",
            "FREQ=DAILY;INTERVAL=0",
            "FREQ=DAILY;INTERVAL=-1",
            "FREQ=DAILY;INTERVAL=x",
            "FREQ=DAILY;BYHOUR=25",
            "FREQ=DAILY;FOO=1",
            "FREQ=DAILY;UNTIL=soon",
            "FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30",
            "DTSTART:yesterday\nRRULE:FREQ=DAILY",
            "DTSTART;TZID=Europe/Atlantis:20260101T060000\nRRULE:FREQ=DAILY",
            5,
        ],
    )
    def test_an_invalid_rule_is_refused_at_its_definition_and_named(self, rule):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at below
            RRuleSchedule(rule)
        assert repr(rule) in str(caught.value)
        assert "\n" not in str(caught.value)

    @given(
        freq=st.sampled_from(["HOURLY", "DAILY", "WEEKLY"]),
        interval=st.integers(1, 40),
        extra=st.sampled_from(
            ["", ";BYDAY=MO,FR", ";BYDAY=SU;WKST=SU", ";BYMONTH=3,9", ";BYDAY=MO,WE,FR;BYSETPOS=-1"]
        ),
        days=st.integers(0, 700),
        seconds=st.integers(0, 86399),
    )
    @settings(max_examples=150, deadline=None)
    def test_starting_near_changes_no_occurrence(self, freq, interval, extra, days, seconds):
        rule = f"FREQ={freq};INTERVAL={interval}{extra}"
        moment = RRULE_ANCHOR + timedelta(days=days, seconds=seconds)
        expected = rrulestr(rule, dtstart=RRULE_ANCHOR).after(moment)
        if expected is not None and expected.year < 2100:
            assert RRuleSchedule(rule).next_after(moment.replace(tzinfo=UTC)).replace(tzinfo=None) == expected


def test_a_naive_moment_is_refused():
    for schedule in SEED_SCHEDULES:
        with pytest.raises(ValueError, match="aware"):
            schedule.next_after(datetime(2026, 1, 1))


def test_fingerprints_are_stable_and_differ_between_schedules():
    assert CronSchedule("*/5  * * * *").fingerprint == "cron:*/5 * * * *"
    assert CronSchedule("0 6 * * *", timezone="Europe/Zurich").fingerprint == "cron@Europe/Zurich:0 6 * * *"
    assert IntervalSeconds(60).fingerprint == IntervalSeconds(60.0).fingerprint == "interval:60"
    assert RRuleSchedule("FREQ=DAILY").fingerprint == "rrule:FREQ=DAILY"
    assert len({schedule.fingerprint for schedule in SEED_SCHEDULES}) == len(SEED_SCHEDULES)
    assert IntervalSeconds(60) == IntervalSeconds(60) != IntervalSeconds(61)
    assert CronSchedule("0 6 * * *") != CronSchedule("0 6 * * *", timezone="Europe/Zurich")
    assert len({IntervalSeconds(1), IntervalSeconds(1)}) == 1
    assert repr(CronSchedule("0 6 * * *", timezone="UTC")) == "CronSchedule('0 6 * * *', timezone='UTC')"


def test_fingerprints_of_close_intervals_differ():
    assert IntervalSeconds(86400.001).fingerprint != IntervalSeconds(86400.002).fingerprint


class Tomorrow(TaskScheduleBase):
    def __init__(self, colour: str) -> None:
        self.colour = colour
        self.thing = object()

    def next_occurrence(self) -> datetime:
        return datetime.now(UTC) + timedelta(days=1)


def test_a_third_party_schedule_needs_only_next_occurrence():
    schedule = Tomorrow("red")
    assert schedule.next_after(utc(2026, 1, 1)) > datetime.now(UTC)
    assert schedule.fingerprint == Tomorrow("red").fingerprint != Tomorrow("blue").fingerprint
    with pytest.raises(TypeError):
        TaskScheduleBase()
