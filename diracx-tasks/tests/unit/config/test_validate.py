"""Validation of a configuration: all errors with their place and remedy."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    CronSchedule,
    ExponentialBackoff,
    IntervalSeconds,
    PeriodicBaseTask,
    PeriodicVoAwareBaseTask,
    TaskScheduleBase,
)
from diracx.tasks.plumbing.config import check_config, checked_tasks_config
from diracx.tasks.plumbing.exceptions import TaskConfigError
from diracx.tasks.plumbing.registry import TaskRegistry
from pydantic import BaseModel, field_validator
from support.raised_exceptions import RAISED

VOS = ["lhcb", "cms"]


@dataclass
class Submit(PeriodicVoAwareBaseTask):
    compute_elements: list[str] | None = None
    most: int = 5

    default_schedule = IntervalSeconds(60)


@dataclass
class Report(PeriodicBaseTask):
    to: str

    default_schedule = CronSchedule("0 * * * *")


class Model(PeriodicBaseTask, BaseModel):
    number: int = 1

    default_schedule: ClassVar[TaskScheduleBase] = IntervalSeconds(60)

    @field_validator("number")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even")
        return value


class Bare(PeriodicBaseTask):
    pass


@dataclass
class Once(BaseTask):
    name: str = ""


@dataclass
class OfVo(BaseTask):
    vo: str
    retry_policy = ExponentialBackoff()


class ByHand(BaseTask):
    def __init__(self, job: Any) -> None:
        self.vo = job.vo


REGISTRY = TaskRegistry({f"test:{cls.__name__}": cls for cls in (Submit, Report, Model, Bare, Once, OfVo, ByHand)})


def found(
    common: dict[str, Any] | None = None, /, vos: Collection[str] | None = VOS, **sections: Any
) -> list[str]:
    config = SimpleNamespace(systems={"Tasks": {"common": common or {}, **sections}})
    _, problems, source = check_config(REGISTRY, vos, config=config)
    return [line.removeprefix("Systems.Tasks: ") for line in source.report(problems)]


def test_a_valid_configuration_has_no_problems():
    assert (
        found(
            {
                "Submit": {
                    "periodic": {"schedule": "0 6 * * *", "timezone": "Europe/Zurich"},
                    "instances": {
                        "a": {"args": {"compute_elements": ["x"]}},
                        "b": {"args": {"most": 1}},
                        "c": None,
                    },
                    "retry_base_delay_seconds": 1,
                    "max_retries": 2,
                },
                "test:Report": {
                    "instances": {
                        "all": {"args": {"to": "me"}, "periodic": {"timezone": "UTC", "schedule": "0 0 * * *"}}
                    }
                },
                "OfVo": {"retry_base_delay_seconds": 1},
            },
            vo_overrides={
                "lhcb": {
                    "test:Submit": {"instances": {"a": {"enabled": False}}},
                    "OfVo": {},
                    "ByHand": {"max_retries": 1},
                }
            },
            limits={"task": {"keys": {"Once": {"concurrency_limit": 1}}}, "job": {}},
            vo_limits={"cms": {"transformation": {}}},
        )
        == []
    )


def test_P46_unknown_names_are_reported_with_the_nearest_known_ones():
    assert found(
        {"test:Sumbit": {}, "tset:Submit": {}, "Reprot": {}},
        vo_overrides={"lchb": {"OfVO": {}}},
        limits={"tsak": {}},
        vo_limits={"cmss": {"jobs": {}}},
    ) == [
        "common.test:Sumbit: unknown task (did you mean 'test:Submit'?)",
        "common.tset:Submit: unknown task (did you mean 'test:Submit'?)",
        "common.Reprot: unknown task (did you mean 'Report'?)",
        "vo_overrides.lchb.OfVO: unknown task (did you mean 'OfVo'?)",
        "limits.tsak: unknown object type (did you mean 'task'?)",
        "vo_limits.cmss.jobs: unknown object type (did you mean 'job'?)",
        "vo_overrides.lchb: unknown VO (did you mean 'lhcb'?)",
        "vo_limits.cmss: unknown VO (did you mean 'cms'?)",
    ]


def test_vos_are_not_validated_if_they_are_unknown():
    assert found(vos=None, vo_overrides={"anybody": {}}) == []


def test_arguments_that_the_class_does_not_accept_are_all_reported():
    assert found(
        {
            "Submit": {"instances": {"a": {"args": {"compute_element": [], "most": "many"}}}},
            "Report": {"instances": {"b": {"args": {"too": 1}}, "c": {}, "d": {"args": {"to": "me"}}}},
            "Model": {"instances": {"e": {"args": {"number": "2"}}, "f": {"args": {"number": 3}}}},
        }
    ) == [
        "common.Submit.instances.a.args.compute_element: Submit: unknown argument 'compute_element' "
        "(did you mean 'compute_elements'?)",
        "common.Submit.instances.a.args.most: Submit: input should be a valid integer, given 'many'",
        "common.Report.instances.b.args.too: Report: unknown argument 'too' (did you mean 'to'?)",
        "common.Report.instances.b.args: Report: missing argument 'to'",
        "common.Report.instances.c: Report: missing argument 'to'",
        "common.Model.instances.e.args.number: Model: input should be a valid integer, given '2'",
        "common.Model.instances.f.args: Model: argument 'number': must be even, given 3",
    ]


@pytest.mark.parametrize("what", RAISED.keys() - {"no name", "no class"})
def test_a_class_that_raises_anything_is_an_error_of_its_instance(what: str) -> None:
    class Raising(PeriodicBaseTask):
        default_schedule = IntervalSeconds(60)

        def __init__(self, number: int) -> None:
            raise RAISED[what]()

    common = {"Raising": {"instances": {"a": {"args": {"number": 1}}}}}
    config = SimpleNamespace(systems={"Tasks": {"common": common}})
    with pytest.raises(TaskConfigError, match=r"common\.Raising\.instances\.a\.args: Raising: \S"):
        checked_tasks_config(TaskRegistry.of({"test:Raising": Raising}), VOS, config=config)


def test_a_vo_is_validated_with_its_merged_settings():
    common = {"Submit": {"instances": {"a": {"args": {"most": 1}}, "b": {"args": {"most": 1}}}}}
    assert found(
        common,
        vo_overrides={
            "lhcb": {"test:Submit": {"instances": {"a": {"args": {"mist": 1}}, "b": {"enabled": False}}}}
        },
    ) == [
        "vo_overrides.lhcb.test:Submit.instances.a.args.mist: Submit: unknown argument 'mist' "
        "(did you mean 'most'?)"
    ]


def test_settings_that_never_have_an_effect_are_reported():
    assert found(
        {
            "Once": {"enabled": False, "periodic": {}, "instances": {}, "retry_base_delay_seconds": 5},
            "Submit": {"periodic": {"timezone": "UTC"}, "instances": {"a": {"periodic": {"timezone": "UTC"}}}},
            "OfVo": {"max_retries": 0, "retry_base_delay_seconds": 5},
            "Bare": {"instances": {"a": {}, "b": {"periodic": {"interval_seconds": 5}}}},
        },
        vo_overrides={"lhcb": {"Once": {"max_retries": 1}, "Report": {}}},
        limits={"task": {"keys": {"test:Once": {"concurrency_limit": 1}}}},
    ) == [
        "common.Once.enabled: has no effect: the task is not periodic",
        "common.Once.periodic: has no effect: the task is not periodic",
        "common.Once.instances: has no effect: the task is not periodic",
        "common.Once.retry_base_delay_seconds: has no effect: the task's policy is NoRetry; "
        "set max_retries, too, for a backoff",
        "common.Submit.periodic.timezone: has no effect without `schedule` or `rrule`",
        "common.Submit.instances.a.periodic.timezone: has no effect without `schedule` or `rrule`",
        "common.OfVo.retry_base_delay_seconds: has no effect: max_retries is 0",
        "common.Bare.instances.a: has no schedule, neither here nor in the code; set one below `periodic`",
        "vo_overrides.lhcb.Once: has no effect: the task belongs to no VO; put it below `common`",
        "vo_overrides.lhcb.Report: has no effect: the task belongs to no VO; put it below `common`",
        "limits.task.keys.test:Once: has no effect: keys of tasks are class names; write 'Once'",
    ]


class TestOfAFile:
    TEXT = """
common:
  Submitt:
    max_retries: -1
  Submit:
    periodic:
      schedule: "61 * * * *"
    rate_limit: 0
    instances:
      a/b: {}
  Report:
    instances:
      daily:
        args: {too: me}
vo_overrides:
  lhbc:
    Report: {enabled: false}
"""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "tasks.yaml"
        path.write_text(self.TEXT)
        return path

    def test_P46_errors_of_form_names_and_arguments_are_in_one_report_in_the_order_of_lines(self, path):
        config, wrong, source = check_config(REGISTRY, VOS, path=path)
        assert config is None
        assert [line.removeprefix(str(path)).split(": ", 2)[:2] for line in source.report(wrong)] == [
            [":3", "common.Submitt"],
            [":4", "common.Submitt.max_retries"],
            [":7", "common.Submit.periodic.schedule"],
            [":8", "common.Submit.rate_limit"],
            [":10", "common.Submit.instances.a/b"],
            [":14", "common.Report.instances.daily.args.too"],
            [":14", "common.Report.instances.daily.args"],
            [":16", "vo_overrides.lhbc"],
            [":17", "vo_overrides.lhbc.Report"],
        ]
        with pytest.raises(TaskConfigError) as caught:
            checked_tasks_config(REGISTRY, VOS, path=path)
        assert str(caught.value).splitlines() == source.report(wrong)

    def test_P46_one_mistake_hides_no_other_and_is_counted_once(self, path):
        path.write_text(
            """\
common:
  Report:
    periodic: {interval_seconds: 0, timezone: UTC}
    instances:
      no good: {}
      daily: {args: {vo: lhcb, too: me}, periodic: {rrule: FREQ=NEVER}}
      hourly: {shedule: 5}
  5: {}
  Submit: {enabled: maybe, time_limit_seconds: 1e-3, max_retries: true}
"""
        )
        _, wrong, source = check_config(REGISTRY, VOS, path=path)
        assert len(wrong) == len(source.report(wrong))
        found = [line.removeprefix(f"{path}:") for line in source.report(wrong)]
        for expected in (
            "3: common.Report.periodic.interval_seconds: must be above 0, not 0",
            "3: common.Report.periodic.timezone: applies to schedule or rrule, not to interval_seconds",
            "5: common.Report.instances.no good: 'no good' is not a valid name of an instance: use up to 64 "
            "letters, digits and . _ -",
            "6: common.Report.instances.daily.args: vo cannot be set: there is one instance for each VO; use "
            "vo_overrides",
            "6: common.Report.instances.daily.args.too: Report: unknown argument 'too' (did you mean 'to'?)",
            "6: common.Report.instances.daily.periodic.rrule: bad recurrence rule 'FREQ=NEVER': "
            "invalid 'FREQ': NEVER",
            "7: common.Report.instances.hourly.shedule: unknown field (known: args, enabled, periodic)",
            "8: common.5: must be text, not 5",
            "9: common.Submit.enabled: must be true or false, not 'maybe'",
            "9: common.Submit.time_limit_seconds: must be a number, not the text '1e-3'",
            "9: common.Submit.max_retries: must be a whole number, not True",
        ):
            assert expected in found
            found.remove(expected)
        assert [line for line in found if "timezone" in line or "common.5" in line] == []

    def test_invalid_yaml_is_reported_with_its_line(self, path):
        path.write_text("common:\n  Report: {enabled: [\n")
        with pytest.raises(TaskConfigError, match=r"tasks\.yaml: not valid YAML: line 3, column 1: "):
            check_config(REGISTRY, VOS, path=path)

    def test_unknown_names_do_not_prevent_the_use_of_a_configuration(self, path):
        path.write_text("common: {Sumbit: {max_retries: 1}}\nlimits: {ce: {}}\n")
        config, warnings = checked_tasks_config(REGISTRY, VOS, path=path)
        assert config.common["Sumbit"].max_retries == 1
        assert warnings == [
            f"{path}:1: common.Sumbit: unknown task (did you mean 'Submit'?)",
            f"{path}:2: limits.ce: unknown object type" + warnings[1].partition("object type")[2],
        ]

    def test_any_yaml_file_is_loaded_or_reported(self, path):
        for text in (
            "common: {Report: {instances: [1]}}",
            "common: {Report: {instances: {a: 5}}}",
            "common: {Report: {instances: {a: {args: 5}}}}",
            "common: {Report: {instances: {a: {args: {1: 2}}}}}",
            "common: {Submit: {periodic: 5, instances: {a: {periodic: [1]}}}}",
            "common: {1: 2, [a]: b}",
            "limits: {task: {keys: [1]}}",
            "limits: {1: {}}",
            "limits: 5",
            "vo_limits: {lhcb: {task: {keys: {a: 5}}}}",
            "vo_overrides: {1: {Submit: {}}}",
            "? [1, 2]\n: 3",
            "5",
        ):
            path.write_text(text)
            try:
                config, wrong, source = check_config(REGISTRY, VOS, path=path)
            except TaskConfigError as error:
                assert "not valid YAML" in str(error)  # noqa: PT017
                continue
            assert config is None, text
            assert source.report(wrong), text
