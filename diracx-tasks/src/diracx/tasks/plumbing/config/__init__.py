"""Configuration of tasks by operators, from a YAML file or the DiracX configuration.

A YAML file (`DIRACX_TASKS_CONFIG`) or the section `Systems.Tasks` of the DiracX configuration::

    common:                          # every VO, and tasks without a VO
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
    vo_overrides:                    # overrides for one VO
      lhcb:
        "my_pilots:MySubmitPilotsTask":
          periodic: {schedule: "*/2 * * * *"}
    limits:                          # of all limiters, by object type and key
      site:
        default: {concurrency_limit: 5}
        keys: {CERN: {concurrency_limit: 50}}
    vo_limits:                       # overrides for one VO, which count its tasks only
      lhcb:
        site:
          default: {concurrency_limit: 2}

A task is named in full (`category:Class`) or by its class alone; the full name takes precedence. Settings that are
not configured are those of the code.
"""

from __future__ import annotations

from .effective import describe_schedule, instance_settings, object_settings, schedule_settings, task_settings
from .loading import CONFIG_PATH_VARIABLE, load_tasks_config
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
from .validate import check_config, checked_tasks_config, unknown_names

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
    "check_config",
    "checked_tasks_config",
    "describe_schedule",
    "instance_settings",
    "load_tasks_config",
    "object_settings",
    "owner",
    "schedule_settings",
    "task_settings",
    "unknown_names",
]
