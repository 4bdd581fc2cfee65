"""YAML of the published documents, and its effects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diracx.tasks.plumbing import BaseTask, CronSchedule, PeriodicVoAwareBaseTask
from diracx.tasks.plumbing.config import TasksConfig, check_config, checked_tasks_config, load_tasks_config
from diracx.tasks.plumbing.config.published import from_published_layout
from diracx.tasks.plumbing.exceptions import TaskConfigError
from diracx.tasks.plumbing.registry import TaskRegistry

DOCUMENTED = """\
tasks:
  common:
    Once:
      enabled: true
      rate_limit: 100
      concurrency_limit: 50
    Submit:
      periodic:
        enabled: true
        schedule: "0 0 * * *"
        interval_seconds: 3600
  vo-overrides:
    lhcb:
      Submit:
        rate_limit: 200
"""

RECORD = """\
common:
  periodic-tasks:
    Submit:
      - args:
          ce_regex: .*
        enabled: True
    Check:
      - schedule: {class: IntervalSecondsSchedule, arg: 30}
  limits:
    Task:
      Submit:
        ConcurrencyLimiter: {limit: 2}
        RateLimiter: {limit: 10, window_seconds: 3600}
    StorageElement:
      default:
        CreateFile:
          ConcurrencyLimiter: {limit: 5}
      "CERN-DST":
        RemoveFile:
          ConcurrencyLimiter: {limit: 6}
    Transformation:
      default:
        ConcurrencyLimiter: {limit: 10}
      "12345":
        ConcurrencyLimiter: {limit: 5}
vo-overrides:
  lhcb:
    periodic-tasks:
      Submit:
        - name: SubmitPilotsCERN
          schedule: {class: RRuleSchedule, arg: "FREQ=HOURLY;INTERVAL=2"}
          args: {ce_regex: .*.cern.ch}
        - name: SubmitPilotsRAL
          schedule: {class: CronSchedule, arg: "0 */6 * * *"}
          args:
          ce_regex: .*.ral.ac.uk
        - args: {ce_regex: other}
          enabled: false
    limits:
      ConcurrencyLimiter:
        Task:
          Check: {limit: 10_000, window_seconds: 3600}
      Transformation:
        default:
          ConcurrencyLimiter: {limit: 1}
"""


class Once(BaseTask):
    pass


class Submit(PeriodicVoAwareBaseTask):
    default_schedule = CronSchedule("0 * * * *")

    def __init__(self, vo: str, ce_regex: str = "") -> None:
        self.vo, self.ce_regex = vo, ce_regex


class Check(PeriodicVoAwareBaseTask):
    default_schedule = CronSchedule("0 * * * *")


REGISTRY = TaskRegistry.of({f"t:{cls.__name__}": cls for cls in (Once, Submit, Check)})


def read(tmp_path: Path, text: str) -> TasksConfig:
    path = tmp_path / "tasks.yaml"
    path.write_text(text)
    return checked_tasks_config(REGISTRY, ["lhcb", "cms"], path=path)[0]


def test_documented_section_with_vo_overrides_is_read(tmp_path: Path) -> None:
    config = read(tmp_path, DOCUMENTED)
    once, submit = config.get_override("t:Once"), config.get_override("t:Submit", "lhcb")
    assert (once.enabled, once.rate_limit, once.concurrency_limit) == (True, 100, 50)
    assert submit.rate_limit == 200


def test_schedule_overrides_interval_seconds(tmp_path: Path) -> None:
    periodic = read(tmp_path, DOCUMENTED).get_override("t:Submit").periodic
    assert periodic is not None
    assert periodic.as_schedule() == CronSchedule("0 0 * * *")


def test_rate_limit_without_a_window_has_that_of_60_seconds_or_the_one_below(tmp_path: Path) -> None:
    assert read(tmp_path, DOCUMENTED).get_override("t:Once").rate_window_seconds == 60
    below = (
        "common: {Submit: {rate_limit: 1, rate_window_seconds: 7}}\n"
        "vo-overrides: {lhcb: {Submit: {rate_limit: 2}}}"
    )
    assert read(tmp_path, below).get_override("t:Submit", "lhcb").rate_window_seconds == 7
    limits = read(tmp_path, "limits: {job: {default: {rate_limit: 3}}}").get_limits("job", "1")
    assert (limits["rate_limit"].value, limits["rate_window_seconds"].value) == (3, 60)


@pytest.mark.parametrize(("enabled", "noted"), [("true", False), ("false", True)])
def test_enabled_of_a_one_shot_task_prevents_no_start(tmp_path: Path, enabled: str, noted: bool) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text(f"vo-overrides: {{}}\ncommon:\n  Once:\n    enabled: {enabled}\n")
    line = f"{path}:4: common.Once.enabled: has no effect: the task is not periodic"
    assert checked_tasks_config(REGISTRY, [], path=path)[1] == ([line] if noted else [])


def test_lists_of_periodic_tasks_are_instances_and_those_of_a_vo_replace_the_common_ones(tmp_path: Path) -> None:
    config = read(tmp_path, RECORD)
    [common] = config.get_override("t:Submit", "cms").instances.values()
    assert common.enabled
    assert common.args == {"ce_regex": ".*"}
    of_vo = config.get_override("t:Submit", "lhcb").instances
    assert {name: each.args["ce_regex"] for name, each in of_vo.items() if each.enabled} == {
        "SubmitPilotsCERN": ".*.cern.ch",
        "SubmitPilotsRAL": ".*.ral.ac.uk",
    }
    assert {name for name, each in of_vo.items() if not each.enabled} == {"1", "3"}
    schedules: dict[str, Any] = {name: each.periodic for name, each in of_vo.items()}
    assert schedules["SubmitPilotsCERN"].rrule == "FREQ=HOURLY;INTERVAL=2"
    assert schedules["SubmitPilotsRAL"].schedule == "0 */6 * * *"
    check = config.get_override("t:Check").periodic
    assert check is not None
    assert check.interval_seconds == 30


def test_limits_of_sections_are_those_of_tasks_and_objects(tmp_path: Path) -> None:
    config = read(tmp_path, RECORD)
    submit, check = config.get_override("t:Submit"), config.get_override("t:Check", "lhcb")
    assert (submit.concurrency_limit, submit.rate_limit, submit.rate_window_seconds) == (2, 10, 3600)
    assert (check.rate_limit, check.rate_window_seconds) == (10_000, 3600)

    def most(obj: str, *keys: str, vo: str | None = None) -> Any:
        found = config.get_limits(obj, *keys, vo=vo)
        return found["concurrency_limit"].value if found else None

    assert [most("transformation", key) for key in ("1", "12345")] == [10, 5]
    assert most("transformation", "1", vo="lhcb") == 1
    assert most("storage_element", "RAL", "CreateFile") == 5
    assert [most("storage_element", se, "RemoveFile") for se in ("RAL", "CERN-DST")] == [None, 6]


def test_mistakes_have_the_line_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text("tasks:\n  vo-overrides:\n    lhcb:\n      Submit: {rate_limit: -1}\n")
    with pytest.raises(TaskConfigError, match=f"{path}:4: vo_overrides.lhcb.Submit.rate_limit: must be at least"):
        load_tasks_config(path)


@pytest.mark.parametrize(
    "wrong", [None, 5, "text", [], [5], {5: 5}, {"class": ["a"]}, {"default": 5}, {"Task": {"a": 5}}]
)
@pytest.mark.parametrize("where", ["periodic-tasks", "limits"])
def test_malformed_values_are_reported_without_other_errors(tmp_path: Path, where: str, wrong: Any) -> None:
    for raw in ({"common": {where: wrong}}, {"vo-overrides": {"lhcb": {where: {"Submit": wrong}}}}, wrong):
        from_published_layout(raw)
    entry = {"common": {"periodic-tasks": {"Submit": [{"schedule": wrong, "args": wrong}]}}}
    from_published_layout(entry)
    path = tmp_path / "tasks.yaml"
    path.write_text("common: {periodic-tasks: {Submit: {a: 1}}}")
    found, problems, _ = check_config(REGISTRY, [], path=path)
    assert found is None
    assert problems
