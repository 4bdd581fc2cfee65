"""Configuration by operators: what they may change about tasks without touching code, and its sources.

Either a YAML file (`DIRACX_TASKS_CONFIG`) or the `Systems.Tasks` section of the DiracX configuration::

    common:                          # every VO, and tasks that know no VO
      "my_pilots:MyPilotTask":
        rate_limit: 100
        rate_window_seconds: 60
      "my_pilots:MySubmitPilotsTask":
        instances:                   # several schedules of one task, each with its own arguments
          fast-sites:
            args: {compute_elements: [ce01.example.org]}
            periodic: {schedule: "0 */2 * * *"}
          the-rest:
            args: {all_but: [ce01.example.org]}
    vo_overrides:                    # on top of that, for one VO
      lhcb:
        "my_pilots:MySubmitPilotsTask":
          periodic: {schedule: "*/2 * * * *"}
    limits:                          # of every limiter that tasks take, by the kind and key of its object
      site:
        default: {concurrency_limit: 5}
        keys: {CERN: {concurrency_limit: 50}}
    vo_limits:                       # on top of that, counting one VO's tasks only
      lhcb:
        site:
          default: {concurrency_limit: 2}

A task is named in full (`category:Class`) or by its class alone; the full name wins. Only what is written
overrides; everything else stays as the code has it.
"""

from __future__ import annotations

from .effective import describe_schedule, instance_settings, object_settings, schedule_in_force, task_settings
from .reading import CONFIG_PATH_VARIABLE, load_tasks_config
from .schema import (
    LimitConfig,
    ObjectLimits,
    PeriodicTaskConfig,
    Setting,
    TaskInstance,
    TaskOverride,
    TasksConfig,
    owner,
)
from .source import Problem, Source
from .validate import check_written, checked_tasks_config, mistakes, problems, unknown_names

__all__ = [
    "CONFIG_PATH_VARIABLE",
    "LimitConfig",
    "ObjectLimits",
    "PeriodicTaskConfig",
    "Problem",
    "Setting",
    "Source",
    "TaskInstance",
    "TaskOverride",
    "TasksConfig",
    "check_written",
    "checked_tasks_config",
    "describe_schedule",
    "instance_settings",
    "load_tasks_config",
    "mistakes",
    "object_settings",
    "owner",
    "problems",
    "schedule_in_force",
    "task_settings",
    "unknown_names",
]
