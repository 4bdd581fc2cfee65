from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from diracx.tasks.plumbing.config import (
    PeriodicTaskConfig,
    TaskOverride,
    TasksConfig,
    load_tasks_config,
    unknown_names,
)
from diracx.tasks.plumbing.config.safe_yaml import SafeLoader
from diracx.tasks.plumbing.enums import Priority
from diracx.tasks.plumbing.exceptions import TaskConfigError
from diracx.tasks.plumbing.lock_registry import TASK
from diracx.tasks.plumbing.locks import ConcurrencyLimiter, RateLimiter, lock_specs
from diracx.tasks.plumbing.schedules import CronSchedule, IntervalSeconds, RRuleSchedule
from pydantic import ValidationError

SUBMIT = "my_pilots:MySubmitPilotsTask"
#: "Billion laughs": each line repeats the one before.
LAUGHS = "common: &0 [1, 1]\n" + "".join(f"x{n}: &{n} [{f'*{n - 1}, ' * 9}]\n" for n in range(1, 12))


@pytest.fixture(autouse=True)
def _no_file_named_by_the_environment(monkeypatch):
    monkeypatch.delenv("DIRACX_TASKS_CONFIG", raising=False)


def config(common: dict[str, Any] | None = None, **vos: dict[str, Any]) -> TasksConfig:
    return TasksConfig.model_validate({"common": common or {}, "vo_overrides": vos})


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tasks.yaml"
    path.write_text(text)
    return path


def problems(path: Path) -> list[str]:
    with pytest.raises(TaskConfigError) as caught:
        load_tasks_config(path)
    return [without_place(line, path) for line in str(caught.value).split("\n")]


def without_place(line: str, path: Path) -> str:
    found = re.fullmatch(rf"{re.escape(str(path))}(?::\d+)?: (.*)", line)
    assert found, line
    return found[1]


class TestSchedule:
    def test_without_configuration_the_schedule_of_the_code_is_used(self):
        assert PeriodicTaskConfig().as_schedule() is None
        assert PeriodicTaskConfig(enabled=False, timezone="UTC").as_schedule() is None

    def test_each_format_of_a_time_is_accepted(self):
        assert PeriodicTaskConfig(schedule="*/5 * * * *").as_schedule() == CronSchedule("*/5 * * * *")
        assert PeriodicTaskConfig(interval_seconds=60).as_schedule() == IntervalSeconds(60)
        assert PeriodicTaskConfig(interval_seconds=0.5).as_schedule() == IntervalSeconds(0.5)
        assert PeriodicTaskConfig(rrule="FREQ=DAILY").as_schedule() == RRuleSchedule("FREQ=DAILY")
        zurich = PeriodicTaskConfig(schedule="0 6 * * *", timezone="Europe/Zurich").as_schedule()
        assert zurich is not None
        assert zurich.next_after(datetime(2026, 1, 1, tzinfo=UTC)) == datetime(2026, 1, 1, 5, tzinfo=UTC)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"schedule": "61 * * * *"}, "bad cron expression '61"),
            ({"schedule": ""}, "bad cron expression ''"),
            ({"rrule": "FREQ=NOPE"}, "bad recurrence rule 'FREQ=NOPE'"),
            ({"rrule": "FREQ=DAILY;COUNT=2"}, "COUNT needs a DTSTART"),
            ({"interval_seconds": 0}, "greater than 0"),
            ({"interval_seconds": -5}, "greater than 0"),
            ({"interval_seconds": True}, "valid number"),
            ({"interval_seconds": "60"}, "valid number"),
            ({"interval_seconds": float("nan")}, "finite"),
            ({"interval_seconds": 1e18}, "at most a century"),
            ({"timezone": "Europe/Atlantis"}, "unknown time zone 'Europe/Atlantis'"),
            ({"schedule": "0 0 * * *", "rrule": "FREQ=DAILY"}, "schedule and rrule exclude"),
            ({"rrule": "FREQ=DAILY", "interval_seconds": 1}, "interval_seconds and rrule exclude"),
            ({"cron": "0 0 * * *"}, "Extra inputs"),
        ],
    )
    def test_invalid_schedules_are_refused_with_the_reason(self, fields, message):
        with pytest.raises(ValidationError, match=message):
            PeriodicTaskConfig(**fields)

    def test_a_time_zone_goes_with_a_recurrence_rule(self):
        both = PeriodicTaskConfig(rrule="FREQ=DAILY", timezone="Europe/Zurich")
        assert both.as_schedule() == RRuleSchedule("FREQ=DAILY", timezone="Europe/Zurich")
        wrong = {"rrule": "DTSTART:20260101T000000Z RRULE:FREQ=DAILY", "timezone": "Europe/Zurich"}
        with pytest.raises(ValidationError, match=r"timezone: does not apply to the rrule: .* a time zone"):
            TasksConfig.model_validate({"common": {"Report": {"periodic": wrong}}})


@pytest.mark.parametrize(
    "fields",
    [
        {"rate_limit": 0},
        {"rate_limit": -1},
        {"rate_limit": 1.5},
        {"rate_limit": True},
        {"rate_limit": 10**16},
        {"rate_window_seconds": 0},
        {"rate_window_seconds": 1e-7},
        {"rate_window_seconds": 1e9},
        {"concurrency_limit": 0},
        {"concurrency_limit": 10**20},
        {"max_retries": -1},
        {"retry_base_delay_seconds": -0.1},
        {"time_limit_seconds": 0},
        {"priority": "urgent"},
        {"rate_limt": 1},
    ],
)
def test_numbers_out_of_range_and_unknown_fields_are_refused(fields):
    with pytest.raises(ValidationError):
        TaskOverride(**fields)


@pytest.mark.parametrize("fields", [(2**53, 1e-6), (1, 315_576_000)])
def test_all_numbers_that_the_configuration_accepts_are_accepted_by_a_limiter(fields):
    limit, window = fields
    override = TaskOverride(rate_limit=limit, rate_window_seconds=window, concurrency_limit=limit)
    rate, concurrency = RateLimiter(TASK, "A"), ConcurrencyLimiter(TASK, "A")
    rate.limit, rate.window_seconds = override.rate_limit, override.rate_window_seconds
    concurrency.limit = override.concurrency_limit
    assert len(lock_specs([rate, concurrency])) == 2


def test_defaults_are_as_published():
    override = TaskOverride()
    assert (override.enabled, override.rate_limit, override.rate_window_seconds) == (True, None, None)
    assert (override.concurrency_limit, override.periodic) == (None, None)
    assert (TasksConfig().common, TasksConfig().vo_overrides) == ({}, {})
    assert (TasksConfig().limits, TasksConfig().vo_limits, override.instances) == ({}, {}, {})
    first, second = TasksConfig(), TasksConfig()
    first.common["a:A"] = override
    assert second.common == {}


class TestOverride:
    def test_nothing_set_is_the_default(self):
        assert config().get_override(SUBMIT) == TaskOverride() == config().get_override(SUBMIT, "lhcb")

    def test_P46_the_vo_wins_field_by_field(self):
        both = config(
            {SUBMIT: {"enabled": False, "rate_limit": 5, "rate_window_seconds": 60, "priority": "realtime"}},
            lhcb={SUBMIT: {"enabled": True, "rate_limit": 7}},
        )
        common, lhcb = both.get_override(SUBMIT, "cms"), both.get_override(SUBMIT, "lhcb")
        assert (common.enabled, common.rate_limit, common.rate_window_seconds) == (False, 5, 60)
        assert (lhcb.enabled, lhcb.rate_limit, lhcb.rate_window_seconds) == (True, 7, 60)
        assert common.priority is lhcb.priority is Priority.REALTIME
        assert both.get_override(SUBMIT) == common

    def test_P46_a_field_that_the_vo_leaves_out_does_not_reset_the_common_one(self):
        both = config({SUBMIT: {"enabled": False}}, lhcb={SUBMIT: {"concurrency_limit": 2}})
        assert both.get_override(SUBMIT, "lhcb").enabled is False

    def test_the_override_of_a_vo_merges_the_schedule_too(self):
        both = config(
            {SUBMIT: {"periodic": {"schedule": "0 6 * * *", "timezone": "Europe/Zurich"}}},
            lhcb={SUBMIT: {"periodic": {"enabled": False}}},
            cms={SUBMIT: {"periodic": {"interval_seconds": 30}}},
        )
        lhcb, cms = both.get_override(SUBMIT, "lhcb").periodic, both.get_override(SUBMIT, "cms").periodic
        assert lhcb is not None
        assert cms is not None
        assert lhcb.enabled is False
        assert lhcb.as_schedule() == CronSchedule("0 6 * * *", timezone="Europe/Zurich")
        assert cms.enabled is True
        assert cms.as_schedule() == IntervalSeconds(30)

    def test_a_task_may_be_named_by_its_class_and_the_full_name_wins(self):
        both = config(
            {"MySubmitPilotsTask": {"enabled": False, "max_retries": 1}, SUBMIT: {"max_retries": 2}},
            lhcb={"MySubmitPilotsTask": {"max_retries": 3}},
        )
        assert both.get_override(SUBMIT).model_dump(exclude_unset=True) == {"enabled": False, "max_retries": 2}
        assert both.get_override(SUBMIT, "lhcb").max_retries == 3
        assert both.get_override("other:MySubmitPilotsTask").max_retries == 1

    def test_null_resets_a_switch(self):
        off = {"enabled": False, "periodic": {"enabled": False}}
        both = config({SUBMIT: off}, lhcb={SUBMIT: {"enabled": None, "periodic": {"enabled": None}}})
        of_vo = both.get_override(SUBMIT, "lhcb")
        assert of_vo.enabled
        assert of_vo.periodic.enabled
        assert not both.get_override(SUBMIT, "cms").enabled

    def test_window_without_a_rate_limit_is_refused_after_merging(self):
        config({SUBMIT: {"rate_limit": 5, "rate_window_seconds": 1}}, lhcb={SUBMIT: {"rate_window_seconds": 9}})
        with pytest.raises(ValidationError, match=f"vo_overrides.lhcb.{SUBMIT}.rate_window_seconds: needs"):
            config(lhcb={SUBMIT: {"rate_window_seconds": 5}})

    def test_null_switches_an_inherited_limit_off(self):
        both = config({SUBMIT: {"rate_limit": 5, "rate_window_seconds": 1}}, lhcb={SUBMIT: {"rate_limit": None}})
        assert both.get_override(SUBMIT, "lhcb").rate_limit is None

    def test_clashes_that_arise_from_merging_are_refused(self):
        with pytest.raises(ValidationError, match="timezone: applies to schedule or rrule"):
            config(
                {SUBMIT: {"periodic": {"interval_seconds": 30}}},
                lhcb={SUBMIT: {"periodic": {"timezone": "UTC"}}},
            )


class TestLoad:
    def test_without_a_source_it_is_empty(self):
        assert load_tasks_config() == TasksConfig()
        for systems in (None, {}, {"Tasks": None}, {"WMS": {}}):
            assert load_tasks_config(config=SimpleNamespace(systems=systems)) == TasksConfig()
        assert load_tasks_config(config=SimpleNamespace()) == TasksConfig()

    def test_P46_from_systems_tasks(self):
        source = SimpleNamespace(systems={"Tasks": {"common": {SUBMIT: {"enabled": False}}}})
        assert load_tasks_config(config=source).get_override(SUBMIT).enabled is False

    def test_P46_from_systems_tasks_of_a_real_configuration(self):
        from diracx.core.config import Config

        real = Config.model_validate(
            {
                "DIRAC": {},
                "Operations": {},
                "Registry": {
                    "lhcb": {
                        "IdP": {"URL": "https://idp.invalid", "ClientID": "x"},
                        "DefaultGroup": "user",
                        "Users": {},
                        "Groups": {"user": {"Properties": [], "Users": []}},
                    }
                },
                "Systems": {"Tasks": {"vo_overrides": {"lhcb": {SUBMIT: {"concurrency_limit": 3}}}}},
            }
        )
        assert load_tasks_config(config=real).get_override(SUBMIT, "lhcb").concurrency_limit == 3

    def test_errors_in_systems_tasks_name_it(self):
        source = SimpleNamespace(systems={"Tasks": {"common": {SUBMIT: {"enabled": []}}}})
        with pytest.raises(TaskConfigError, match=rf"^Systems\.Tasks: common\.{SUBMIT}\.enabled: "):
            load_tasks_config(config=source)

    def test_the_file_wins_and_the_environment_names_it(self, tmp_path, monkeypatch):
        path = written(tmp_path, f"common:\n  {SUBMIT}:\n    max_retries: 3\n")
        source = SimpleNamespace(systems={"Tasks": {"common": {SUBMIT: {"max_retries": 5}}}})
        assert load_tasks_config(path, source).get_override(SUBMIT).max_retries == 3
        monkeypatch.setenv("DIRACX_TASKS_CONFIG", str(path))
        assert load_tasks_config(config=source).get_override(SUBMIT).max_retries == 3
        monkeypatch.setenv("DIRACX_TASKS_CONFIG", "")
        assert load_tasks_config(config=source).get_override(SUBMIT).max_retries == 5

    def test_empty_files_and_sections_are_empty(self, tmp_path):
        for text in ("", "common:\nvo_overrides:\n", "vo_overrides:\n  lhcb:\n"):
            assert load_tasks_config(written(tmp_path, text)).common == {}
        (tmp_path / "none.yaml").symlink_to(os.devnull)
        assert load_tasks_config(tmp_path / "none.yaml").common == {}

    def test_P46_every_error_in_one_report_with_its_path(self, tmp_path):
        path = written(
            tmp_path,
            """
            commn: {}
            common:
              "my_pilots:X":
                periodic: {schedule: "61 * * * *", enabld: true}
                concurrency_limit: -1
              "my_pilots:Y": 5
              "my_pilots:Z": {rate_window_seconds: 5}
            vo_overrides:
              lhcb:
                "my_pilots:X":
                  priority: urgent
                  rate_limt: 7
                  periodic: {schedule: "0 0 * * *", rrule: FREQ=DAILY}
            """,
        )
        found = dict(line.split(": ", 1) for line in problems(path))
        assert found.keys() == {
            "commn",
            "common.my_pilots:X.periodic.schedule",
            "common.my_pilots:X.periodic.enabld",
            "common.my_pilots:X.concurrency_limit",
            "common.my_pilots:Y",
            "common.my_pilots:Z.rate_window_seconds",
            "vo_overrides.lhcb.my_pilots:X.priority",
            "vo_overrides.lhcb.my_pilots:X.rate_limt",
            "vo_overrides.lhcb.my_pilots:X.periodic",
        }
        assert found["commn"] == "unknown field (did you mean 'common'?)"
        assert found["common.my_pilots:X.periodic.schedule"].startswith("bad cron expression '61 * * * *'")
        assert found["common.my_pilots:X.periodic.enabld"] == "unknown field (did you mean 'enabled'?)"
        assert found["common.my_pilots:X.concurrency_limit"].endswith("must be at least 1, not -1")
        assert found["common.my_pilots:Y"] == "must be a mapping of names to values, not 5"
        assert "'realtime', 'normal' or 'background'" in found["vo_overrides.lhcb.my_pilots:X.priority"]
        assert found["vo_overrides.lhcb.my_pilots:X.rate_limt"] == "unknown field (did you mean 'rate_limit'?)"

    def test_a_single_merge_problem_is_reported_by_path(self, tmp_path):
        path = written(tmp_path, "common: {'a:Z': {rate_window_seconds: 5}}")
        assert problems(path) == ["common.a:Z.rate_window_seconds: needs rate_limit"]

    @pytest.mark.parametrize(
        ("text", "start"),
        [
            ("common: [", "not valid YAML: "),
            ("- a\n- b\n", "the top level: must be a mapping"),
            ("common: [1]", "common: must be a mapping"),
            ("!!python/object:os.system {}", "not valid YAML: "),
            ("common: {1: {}}", "common.1"),
            ("common: !!timestamp x", "not valid YAML: line 1, column 9: this is no valid timestamp"),
            ("common: !!bool x", "not valid YAML: line 1, column 9: this is no valid bool"),
            (f"common: 1{':1' * 200}.0", "not valid YAML: line 1, column 9: this is no valid float"),
            (r'common: "\U00110000"', "not valid YAML: line 1, column 12: found no such character"),
            (r'common: "\UFFFFFFFF"', "not valid YAML: line 1, column 12: found no such character"),
            (LAUGHS, "not valid YAML: line 1, column 1: its aliases repeat too many values"),
            ("&a [*a]", "the top level: must be a mapping"),
        ],
    )
    def test_values_other_than_mappings_of_names_are_refused(self, tmp_path, text, start):
        [line] = problems(written(tmp_path, text))
        assert line.startswith(start)

    def test_long_files_may_repeat_aliases(self):
        text = f"a: &a [{'0, ' * 25_000}]\nb: [{'*a, ' * 45}]"
        assert yaml.load(text, SafeLoader)["b"] == [[0] * 25_000] * 45

    def test_a_file_that_cannot_be_read_is_named(self, tmp_path):
        assert problems(tmp_path / "nowhere.yaml") == ["cannot be read: No such file or directory"]
        os.mkfifo(tmp_path / "fifo")
        assert problems(tmp_path / "fifo") == ["cannot be read: it is no regular file"]


def test_P46_unknown_tasks_and_vos_are_reported_with_the_nearest_name():
    given = config(
        {SUBMIT: {}, "my_pilots:MySubmitPilotTask": {}, "MySubmitPilotsTask": {}, "Nothing": {}},
        lhcb={"my_pilot:MySubmitPilotsTask": {}},
        lchb={},
    )
    assert unknown_names(given, [SUBMIT, "jobs:Clean"], ["lhcb", "cms"]) == [
        f"common.my_pilots:MySubmitPilotTask: unknown task (did you mean '{SUBMIT}'?)",
        "common.Nothing: unknown task (known: Clean, MySubmitPilotsTask)",
        f"vo_overrides.lhcb.my_pilot:MySubmitPilotsTask: unknown task (did you mean '{SUBMIT}'?)",
        "vo_overrides.lchb: unknown VO (did you mean 'lhcb'?)",
    ]
    assert unknown_names(TasksConfig(), [], []) == []
