"""YAML of the published documents, and its effects."""

from __future__ import annotations

from pathlib import Path

import pytest
from diracx.tasks.plumbing import BaseTask, CronSchedule, PeriodicVoAwareBaseTask
from diracx.tasks.plumbing.config import TasksConfig, checked_tasks_config, load_tasks_config
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


class Once(BaseTask):
    pass


class Submit(PeriodicVoAwareBaseTask):
    default_schedule = CronSchedule("0 * * * *")


REGISTRY = TaskRegistry.of({f"t:{cls.__name__}": cls for cls in (Once, Submit)})


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


def test_mistakes_have_the_line_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text("tasks:\n  vo-overrides:\n    lhcb:\n      Submit: {rate_limit: -1}\n")
    with pytest.raises(TaskConfigError, match=f"{path}:4: vo_overrides.lhcb.Submit.rate_limit: must be at least"):
        load_tasks_config(path)
