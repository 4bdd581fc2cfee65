"""Every public name is importable from its published path, which extensions use."""

import re
import tomllib
from importlib import import_module

import pytest
from diracx.tasks.plumbing import BaseTask, LockedObjectType, wrap_task
from diracx.tasks.plumbing.broker.models import TaskResult
from packaging.requirements import Requirement
from support.paths import ROOT

EVERYTHING = """
    AvailableSecurityProperties BaseLimiter BaseLock BaseTask CallbackSpawner ConcurrencyLimiter Config
    CronSchedule ExclusiveRWLock ExponentialBackoff IntervalSeconds LockedObjectType MutexLock NoRetry
    NoTransaction PeriodicBaseTask PeriodicTaskConfig PeriodicVoAwareBaseTask Priority RRuleSchedule RateLimiter
    ResultIsMissingError RetryPolicyBase SendTaskError SharedRWLock Size StopRetryingError TaskOverride
    TaskRetryRequestedError TaskScheduleBase TasksConfig TooManyRetriesError UnableToAcquireLockError
    UnretryableError auto_inject auto_inject_depends find_missing_overrides fire_callback load_task_registry
    register_locked_object_type setup_dependency_overrides spawn_with_callback task_wrapper validate_registry
    wrap_task
"""
DEPENDS = "AvailableSecurityProperties CallbackSpawner Config NoTransaction auto_inject auto_inject_depends"
PUBLIC = {
    "diracx.tasks.plumbing": EVERYTHING,
    "diracx.tasks.plumbing.locks": (
        "MutexLock ExclusiveRWLock SharedRWLock RateLimiter ConcurrencyLimiter BaseLock BaseLimiter"
    ),
    "diracx.tasks.plumbing.lock_registry": (
        "LockedObjectType register_locked_object_type validate_registry TASK JOB TRANSFORMATION"
    ),
    "diracx.tasks.plumbing.schedules": "TaskScheduleBase IntervalSeconds CronSchedule RRuleSchedule",
    "diracx.tasks.plumbing.retry_policies": "RetryPolicyBase NoRetry ExponentialBackoff",
    "diracx.tasks.plumbing.base_task": "BaseTask PeriodicBaseTask PeriodicVoAwareBaseTask",
    "diracx.tasks.plumbing.enums": "Priority Size",
    "diracx.tasks.plumbing.broker": (
        "RedisStreamBroker ReceivedMessage RedisResultBackend TaskBinding TaskMessage TaskResult submit_task"
    ),
    "diracx.tasks.plumbing.broker.result_backend": "RedisResultBackend",
    "diracx.tasks.plumbing.broker.models": "ReceivedMessage TaskBinding TaskMessage TaskResult submit_task",
    "diracx.tasks.plumbing.broker.redis_streams": "RedisStreamBroker ALL_STREAM_NAMES stream_name_for",
    "diracx.tasks.plumbing.worker": "Worker",
    "diracx.tasks.plumbing.scheduler": "TaskScheduler",
    "diracx.tasks.plumbing.persistence": "TaskDB",
    "diracx.tasks.plumbing.persistence.dlq": "TaskDB",
    "diracx.tasks.plumbing.depends": DEPENDS,
    "diracx.tasks.plumbing.factory": (
        "create_task_bindings find_missing_overrides load_task_registry setup_dependency_overrides task_wrapper "
        "wrap_task"
    ),
    "diracx.tasks.depends": DEPENDS,
    "diracx.tasks.jobs": "CleanSandboxStoreTask DummyJobExecutorMonitorTask DummyJobExecutorTask",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_importable_from_their_published_paths(module: str) -> None:
    found = import_module(module)
    assert [name for name in PUBLIC[module].split() if not hasattr(found, name)] == []


def test_a_name_is_one_object_whatever_path_it_is_imported_from() -> None:
    plumbing = import_module("diracx.tasks.plumbing")
    for module, names in PUBLIC.items():
        found = import_module(module)
        for name in set(names.split()) & set(EVERYTHING.split()):
            assert getattr(found, name) is getattr(plumbing, name), f"{module}.{name}"


class Plain(BaseTask):
    """Any task."""

    async def execute(self) -> None:
        pass


async def test_error_messages_match_those_that_tests_of_extensions_expect() -> None:
    with pytest.raises(RuntimeError, match="not bound to a broker"):  # words of 0.7
        await Plain().schedule()
    with pytest.raises(ValueError, match="Unknown LockedObjectType"):
        LockedObjectType("nonexistent")
    with pytest.raises(RuntimeError, match=r"\[ValueError\] boom"):
        TaskResult.from_exception(ValueError("boom"), 0.1).raise_for_error()


def test_a_wrapped_task_has_the_name_of_its_class() -> None:
    assert wrap_task(Plain).__name__ == "Plain"


def test_every_name_that_plumbing_lists_is_there() -> None:
    plumbing = import_module("diracx.tasks.plumbing")
    assert all(getattr(plumbing, name) for name in plumbing.__all__)


def test_the_reference_has_the_module_of_every_public_name() -> None:
    plumbing = import_module("diracx.tasks.plumbing")
    modules = {getattr(getattr(plumbing, name), "__module__", "") for name in plumbing.__all__}
    pages = "".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    own = {module for module in modules if module.startswith("diracx.tasks")}
    assert {module for module in own if module not in shown and module.rpartition(".")[0] not in shown} == set()


@pytest.mark.parametrize(
    ("name", "too_old"),
    [
        ("croniter", "5.0.1"),  # no CroniterError
        ("diracx-core", "0.6"),  # no diracx.core.logs in 0.5, which pip chose beside an old OpenTelemetry
        ("diracx-db", "0.6"),
        ("diracx-logic", "0.6"),
        ("msgpack", "0.6.2"),  # no Timestamp
        ("python-dateutil", "2.7.0"),  # refuses fewer recurrence rules
    ],
)
def test_versions_of_dependencies_that_lack_something_are_not_admitted(name: str, too_old: str) -> None:
    project = tomllib.loads((ROOT / "diracx-tasks/pyproject.toml").read_text("utf-8"))["project"]
    [needed] = [each for each in map(Requirement, project["dependencies"]) if each.name == name]
    assert not needed.specifier.contains(too_old)
