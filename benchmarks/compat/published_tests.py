"""Run the tests of the published source distribution against ours, and explain each failure."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

from benchmarks.peers.environments import ENVIRONMENTS, ROOT

_WHERE = ENVIRONMENTS / "published-tests"
_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
_FAKES = ("fakeredis==2.41.0", "lupa==2.8", "sortedcontainers==2.4.0")
_ONLY_MOCKS = "private: counts the Redis commands of a mock; ours takes locks by a script"
_OF_THE_WORKER = "private: imports and calls steps of the published Worker; test_outcomes.py has the behaviour"
_OF_THE_SCHEDULER = "private: calls steps of the published TaskScheduler; test_scheduler.py has the behaviour"
_PATCHES_LOGIC = "private: replaces names that the published module imports; see test_jobs.py"

#: Test, or all of a file -> why it fails.
REASONS = {
    "test_callbacks_integration.py": "private: a step of the published Worker; see test_groups.py",
    "test_dummy_job_executor.py::test_monitor_schedule_activation_is_environment_controlled": (
        "private: runs the published Worker's registry in a process, with a mock of its broker"
    ),
    "test_dummy_job_executor.py::test_executor_walks_job_through_the_state_machine": _PATCHES_LOGIC,
    "test_dummy_job_executor.py::test_monitor_moves_received_jobs_and_schedules_executors": _PATCHES_LOGIC,
    "test_dummy_job_executor.py::test_monitor_does_nothing_without_received_jobs": _PATCHES_LOGIC,
    "test_factory.py::test_wrap_task_creates_callable": "private: the attribute `_dependant`, made by FastAPI",
    "test_logs.py": _OF_THE_WORKER,
    "test_otel.py": _OF_THE_WORKER,
    "test_redis_streams.py::test_renew_generator_calls_xclaim": "private: a step of the published broker",
    "test_scheduler_integration.py": _OF_THE_SCHEDULER,
    "test_task_wrapper.py::test_task_wrapper_interactive_skips_limiters": _ONLY_MOCKS,
    "test_task_wrapper.py::test_task_wrapper_lock_failure_raises": _ONLY_MOCKS,
    "test_task_wrapper.py::test_task_wrapper_non_interactive_acquires_limiters": _ONLY_MOCKS,
    "test_task_wrapper.py::test_task_wrapper_releases_on_exception": _ONLY_MOCKS,
    "test_task_wrapper.py::test_task_wrapper_with_redis_acquires_locks": _ONLY_MOCKS,
    "test_worker_integration.py": _OF_THE_WORKER,
}


def _prepare() -> Path:
    """The directory of the unpacked source distribution, beside the packages its tests need."""
    stamp = _WHERE / "stamp"
    if not stamp.exists():
        _WHERE.mkdir(parents=True, exist_ok=True)
        command = [*_PIP, "download", "--no-deps", "--no-binary", "diracx-tasks", "--dest", str(_WHERE)]
        subprocess.run([*command, "diracx-tasks==0.7.0"], check=True, timeout=300)
        subprocess.run([*_PIP, "install", "--no-deps", "--target", str(_WHERE / "fakes"), *_FAKES], check=True)
        [archive] = _WHERE.glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(_WHERE, filter="data")
        (_WHERE / "pytest.ini").write_text(
            "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
        )
        stamp.touch()
    [unpacked] = _WHERE.glob("diracx_tasks-*/tests")
    return unpacked


def results() -> dict[str, str]:
    """Test -> '' when it passes, or in a line why not. A file that cannot be imported has one line."""
    tests = _prepare()
    options = ["-p", "diracx.testing", "--import-mode=importlib", "-p", "no:cacheprovider", "--tb=line", "-rA"]
    command = [sys.executable, "-m", "pytest", "-c", str(_WHERE / "pytest.ini"), "--rootdir", str(tests.parent)]
    environment = {**os.environ, "PYTHONPATH": str(_WHERE / "fakes"), "COLUMNS": "400"}
    done = subprocess.run(
        [*command, *options, "--continue-on-collection-errors", str(tests)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    found = {}
    for outcome, name, why in re.findall(
        r"^(PASSED|FAILED|ERROR) \S*/tests/(\S+)(?: - (.*))?$", done.stdout, re.MULTILINE
    ):
        found[name] = "" if outcome == "PASSED" else why or outcome
    return found


def report(found: dict[str, str]) -> bool:
    """Print how many pass, and why the others do not. Whether one fails without a reason."""
    failed = {name: why for name, why in found.items() if why}
    reasons = {name: REASONS.get(name) or REASONS.get(name.partition("::")[0]) for name in failed}
    print(f"tests of the published source distribution: {len(found) - len(failed)} pass, {len(failed)} do not")
    for reason, many in Counter(filter(None, reasons.values())).most_common():
        print(f"  {many:2} {reason}")
    wrong = [f"{name}: NO REASON: {failed[name]}" for name, reason in sorted(reasons.items()) if not reason]
    unused = REASONS.keys() - failed.keys() - {name.partition("::")[0] for name in failed}
    wrong += [f"{name}: passes, and has a reason why it does not" for name in sorted(unused)]
    print("".join(f"  {line}\n" for line in wrong))
    return bool(wrong) or not found
