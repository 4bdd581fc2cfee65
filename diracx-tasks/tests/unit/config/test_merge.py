"""Instances, limits of objects, and provenance of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diracx.tasks.plumbing.config import TaskInstance, TasksConfig, load_tasks_config
from diracx.tasks.plumbing.exceptions import TaskConfigError
from diracx.tasks.plumbing.schedules import CronSchedule, IntervalSeconds
from pydantic import ValidationError

SUBMIT = "my_pilots:MySubmitPilotsTask"


def config(common: dict[str, Any] | None = None, **more: Any) -> TasksConfig:
    return TasksConfig.model_validate({"common": common or {}, **more})


def wrong(**sections: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        TasksConfig.model_validate(sections)
    return str(caught.value)


class TestInstances:
    def test_a_task_has_several_schedules_each_with_arguments(self):
        given = config(
            {
                SUBMIT: {
                    "instances": {
                        "fast-sites": {"args": {"ces": ["a"]}, "periodic": {"schedule": "0 */2 * * *"}},
                        "the-rest": {"args": {"all_but": ["a"]}, "enabled": False},
                        "plain": None,
                    }
                }
            }
        )
        instances = given.get_override(SUBMIT, "lhcb").instances
        assert list(instances) == ["fast-sites", "the-rest", "plain"]
        assert instances["fast-sites"].args == {"ces": ["a"]}
        assert instances["fast-sites"].periodic.as_schedule() == CronSchedule("0 */2 * * *")
        assert instances["the-rest"].enabled is False
        assert instances["plain"] == TaskInstance()

    def test_the_schedule_of_an_instance_is_merged_with_that_of_the_task(self):
        given = config(
            {
                SUBMIT: {
                    "periodic": {"schedule": "0 6 * * *", "timezone": "Europe/Zurich", "missed": "skip"},
                    "instances": {
                        "a": {"periodic": {"interval_seconds": 60}},
                        "b": {"periodic": {"missed": "once"}},
                    },
                }
            },
            vo_overrides={"lhcb": {SUBMIT: {"periodic": {"enabled": False}}}},
        )
        a, b = (given.get_override(SUBMIT).instances[name].periodic for name in "ab")
        assert (a.as_schedule(), a.missed) == (IntervalSeconds(60), "skip")
        assert (b.as_schedule(), b.missed) == (CronSchedule("0 6 * * *", timezone="Europe/Zurich"), "once")
        assert given.get_override(SUBMIT, "lhcb").instances["a"].periodic.enabled is False

    def test_a_vo_changes_fields_of_an_instance_and_adds_its_own(self):
        given = config(
            {"MySubmitPilotsTask": {"instances": {"a": {"args": {"x": 1}, "periodic": {"interval_seconds": 60}}}}},
            vo_overrides={
                "lhcb": {SUBMIT: {"instances": {"a": {"args": {"y": 2}}, "b": {}}}},
                "cms": {SUBMIT: {"instances": None}},
                "cta": {SUBMIT: {"max_retries": 1}},
            },
        )
        lhcb = given.get_override(SUBMIT, "lhcb").instances
        assert list(lhcb) == ["a", "b"]
        assert lhcb["a"].args == {"y": 2}
        assert lhcb["a"].periodic.as_schedule() == IntervalSeconds(60)
        assert given.get_override(SUBMIT, "cms").instances == {}
        assert list(given.get_override(SUBMIT, "cta").instances) == ["a"]

    @pytest.mark.parametrize("name", ["a/b", "a@b", "a:b", "", "-a", "a b", "x" * 65])
    def test_a_name_that_is_invalid_in_the_id_of_a_schedule_is_refused(self, name):
        assert "not a valid name of an instance" in wrong(common={SUBMIT: {"instances": {name: {}}}})

    def test_bad_instances_are_refused(self):
        assert "use vo_overrides" in wrong(common={SUBMIT: {"instances": {"a": {"args": {"vo": "lhcb"}}}}})
        assert "valid dictionary" in wrong(common={SUBMIT: {"instances": {"a": {"args": [1]}}}})
        assert "Extra inputs" in wrong(common={SUBMIT: {"instances": {"a": {"argz": {}}}}})
        assert "instances.a.periodic.timezone: applies to schedule or rrule" in wrong(
            common={
                SUBMIT: {
                    "periodic": {"interval_seconds": 5},
                    "instances": {"a": {"periodic": {"timezone": "UTC"}}},
                }
            }
        )


class TestLimits:
    GIVEN = config(
        limits={
            "ce": {
                "default": {"concurrency_limit": 5, "rate_limit": 10, "rate_window_seconds": 60},
                "keys": {
                    "*:upload": {"concurrency_limit": 6},
                    "big": {"concurrency_limit": 50},
                    "big:upload": {"concurrency_limit": 7},
                    12: {},
                },
            }
        },
        vo_limits={"lhcb": {"ce": {"default": {"concurrency_limit": 2}, "keys": {"big": {"rate_limit": None}}}}},
    )

    def values(self, *keys: str, vo: str | None = None) -> dict[str, Any]:
        return {name: setting.value for name, setting in self.GIVEN.get_limits("ce", *keys, vo=vo).items()}

    def test_the_key_overrides_the_default_field_by_field(self):
        rate = {"rate_limit": 10, "rate_window_seconds": 60}
        assert self.values("small") == self.values("12") == {"concurrency_limit": 5, **rate}
        assert self.values("big") == self.values("big", "submit") == {"concurrency_limit": 50, **rate}
        assert self.values("big", "upload") == {"concurrency_limit": 7, **rate}
        assert self.values("small", "upload") == {"concurrency_limit": 6, **rate}
        assert self.GIVEN.get_limits("job", "1") == {}

    def test_settings_of_a_vo_override_common_ones_and_null_restores_those_of_the_code(self):
        assert self.values("small", vo="lhcb")["concurrency_limit"] == 2
        assert self.values("big", vo="lhcb") == {"concurrency_limit": 2, "rate_window_seconds": 60}
        assert self.values("big", vo="cms") == self.values("big")

    def test_each_number_has_its_file_and_line(self):
        small = self.GIVEN.get_limits("ce", "small", vo="lhcb")
        assert small["concurrency_limit"].path == ("vo_limits", "lhcb", "ce", "default", "concurrency_limit")
        assert small["rate_limit"].path == ("limits", "ce", "default", "rate_limit")
        big = self.GIVEN.get_limits("ce", "big")
        assert big["concurrency_limit"].path == ("limits", "ce", "keys", "big", "concurrency_limit")

    def test_window_without_a_rate_limit_is_refused_after_merging(self):
        whole = {"rate_limit": 1, "rate_window_seconds": 1}
        config(limits={"ce": {"default": whole, "keys": {"a": {"rate_limit": 2}}}})
        config(limits={"ce": {"default": whole}}, vo_limits={"lhcb": {"ce": {"keys": {"a": {"rate_limit": 2}}}}})
        assert "vo_limits.lhcb.ce.default.rate_window_seconds: needs" in wrong(
            vo_limits={"lhcb": {"ce": {"default": {"rate_window_seconds": 2}}}}
        )

    def test_empty_sections_are_empty(self):
        empty = config(
            limits={"ce": None, "job": {"default": None, "keys": {"1": None}}}, vo_limits={"lhcb": None}
        )
        assert empty.get_limits("ce", "a") == empty.get_limits("job", "1", vo="lhcb") == {}


def test_each_setting_has_its_provenance():
    given = config(
        {
            "MySubmitPilotsTask": {"max_retries": 1, "periodic": {"schedule": "0 * * * *", "missed": "skip"}},
            SUBMIT: {"instances": {"a": {"periodic": {"interval_seconds": 5}}, "b": {"enabled": False}}},
        },
        vo_overrides={
            "lhcb": {SUBMIT: {"max_retries": None, "time_limit_seconds": 5, "periodic": {"rrule": None}}}
        },
    )
    assert given.source_of(SUBMIT, None, "max_retries") == "common"
    assert given.source_of(SUBMIT, "lhcb", "max_retries") == "code"
    assert given.source_of(SUBMIT, "lhcb", "time_limit_seconds") == "vo lhcb"
    assert given.source_of(SUBMIT, "cms", "time_limit_seconds") == "code"
    assert given.source_of(SUBMIT, "lhcb", "periodic.missed") == "common"
    assert given.source_of(SUBMIT, "lhcb", "periodic") == "common"
    assert given.source_of("other:Task", "lhcb", "periodic") == "code"
    assert given.path_of(SUBMIT, None, "periodic") == ("common", "MySubmitPilotsTask", "periodic", "schedule")
    assert given.path_of(SUBMIT, None, "periodic", "a") == (
        "common",
        SUBMIT,
        "instances",
        "a",
        "periodic",
        "interval_seconds",
    )
    assert given.path_of(SUBMIT, None, "periodic", "b") == ("common", "MySubmitPilotsTask", "periodic", "schedule")
    assert given.path_of(SUBMIT, None, "enabled", "b") == ("common", SUBMIT, "instances", "b", "enabled")


class TestLines:
    def written(self, tmp_path: Path, text: str) -> Path:
        path = tmp_path / "tasks.yaml"
        path.write_text(text)
        return path

    def test_a_configuration_has_its_file_and_lines(self, tmp_path):
        path = self.written(tmp_path, "common:\n  A:\n    max_retries: 3\n  B: &b\n    enabled: false\n  C: *b\n")
        source = load_tasks_config(path).source
        assert source.name == str(path)
        assert source.at(("common", "A", "max_retries")) == f"{path}:3"
        assert source.line(("common", "C", "enabled")) == 5
        assert source.line(("common", "A", "unwritten")) == 2
        assert source.line(("nothing",)) is None
        assert load_tasks_config(path) == TasksConfig.model_validate(load_tasks_config(path).configured)

    def test_every_problem_has_the_line_of_its_place(self, tmp_path):
        text = (
            "common:\n  A:\n    periodic:\n      schedule: nope\n    rate_window_seconds: 5\n"
            "limits:\n  ce: {defualt: {}}\n"
        )
        path = self.written(tmp_path, text)
        with pytest.raises(TaskConfigError) as caught:
            load_tasks_config(path)
        places = [line.split(": ")[:2] for line in str(caught.value).splitlines()]
        assert places == [
            [f"{path}:4", "common.A.periodic.schedule"],
            [f"{path}:5", "common.A.rate_window_seconds"],
            [f"{path}:7", "limits.ce.defualt"],
        ]
        assert "did you mean 'default'?" in str(caught.value)

    def test_a_duplicate_key_is_refused(self, tmp_path):
        path = self.written(tmp_path, "common:\n  A: {max_retries: 3}\n  A: {enabled: false}\n")
        with pytest.raises(TaskConfigError, match=f"{path}:3: common.A: is a duplicate key"):
            load_tasks_config(path)

    def test_a_merge_key_is_no_duplicate(self, tmp_path):
        path = self.written(
            tmp_path,
            "common:\n  A: &a {max_retries: 3, enabled: false}\n  B:\n    <<: *a\n    max_retries: 4\n",
        )
        loaded = load_tasks_config(path)
        assert loaded.get_override("x:B").max_retries == 4
        assert loaded.source.line(("common", "B", "enabled")) == 2
