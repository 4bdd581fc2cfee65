"""The commands `worker` and `scheduler`: start, signals and errors, as under an init system."""

from __future__ import annotations

import signal
import subprocess
from contextlib import suppress

import pytest

SECOND_FILE = """
from dataclasses import dataclass
from diracx.tasks.plumbing import BaseTask

@dataclass
class Greet(BaseTask):
    async def execute(self): ...
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_worker_lets_its_tasks_end(served, tmp_path, wait_until, number):
    worker = served.start("worker", "--worker-size", "medium", "--module", "my_tasks.py", "--grace", "20")
    worker.until("ready: medium tasks, 10 at a time")
    begun = tmp_path / "begun"
    waiting = served.start(
        *("submit", "my_tasks:Slow", "--kwargs", f'{{"begun": "{begun}", "seconds": 0.7}}'),
        *("--wait", "--module", "my_tasks.py"),
    )
    wait_until(begun.exists, "the task runs")
    worker.process.send_signal(number)
    assert worker.ends() == 0, worker.output
    assert waiting.ends() == 0, waiting.output
    assert "finished" in waiting.output


@pytest.mark.leaves_keys("diracx:tasks:normal:medium:handover")
def test_a_second_signal_interrupts_running_tasks_which_another_worker_restarts(served, tmp_path, wait_until):
    worker = served.start("worker", "--module", "my_tasks.py", "--grace", "600")
    worker.until("ready")
    begun = tmp_path / "begun"
    waiting = served.start(
        *("submit", "my_tasks:Slow", "--kwargs", f'{{"begun": "{begun}", "seconds": 600}}'),
        *("--wait", "--module", "my_tasks.py"),
    )
    wait_until(begun.exists, "the task runs")
    worker.process.terminate()
    worker.until("SIGTERM: stopping")
    begun.unlink()
    worker.process.terminate()
    assert worker.ends() == 0, worker.output
    assert "was interrupted, and starts again" in worker.output
    served.start("worker", "--module", "my_tasks.py", "--grace", "0").until("ready")
    wait_until(begun.exists, "the task runs again")
    assert waiting.process.poll() is None


@pytest.mark.parametrize("command", ["worker", "scheduler"])
def test_signals_that_come_after_the_last_task_do_not_spoil_the_exit_code(served, command):
    serving = served.start(command)
    serving.until("ready")
    while serving.process.poll() is None:
        serving.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            serving.process.wait(0.005)
    assert serving.ends() == 0, serving.output


def test_P28_tasks_that_share_their_default_locks_are_reported_at_the_start(served, tmp_path):
    (tmp_path / "other_tasks.py").write_text(SECOND_FILE)
    worker = served.start("worker", "--module", "my_tasks.py", "--module", "other_tasks.py")
    worker.until("ready")
    (line,) = [line for line in worker.output.splitlines() if "WARNING" in line and "Greet" in line]
    assert "my_tasks:Greet (my_tasks)" in line
    assert "other_tasks:Greet (other_tasks)" in line


def test_a_worker_without_a_dead_letter_database_logs_one_line(served):
    worker = served.start("worker")
    worker.until("ready")
    assert sum("DIRACX_DB_URL_TASKDB" in line for line in worker.output.splitlines()) == 1


def test_a_worker_takes_its_dead_letter_database(served, initialised_task_db):
    served.environment["DIRACX_DB_URL_TASKDB"] = initialised_task_db
    worker = served.start("worker")
    worker.until("ready")
    assert "DIRACX_DB_URL_TASKDB" not in worker.output


OPTIONAL = """
from typing import Annotated, Any

from diracx.db.sql import PilotAgentsDB
from diracx.tasks.plumbing.base_task import BaseTask
from diracx.tasks.plumbing.depends import NoTransaction


class CountPilots(BaseTask):
    async def execute(self, registry: Annotated[PilotAgentsDB, NoTransaction()]{default}, **kwargs: Any) -> int:
        return 0
"""


@pytest.mark.parametrize("default", ["", " = None"])
def test_a_worker_starts_without_a_database_that_its_tasks_can_do_without(served, tmp_path, default):
    (tmp_path / "counting.py").write_text(OPTIONAL.format(default=default))
    served.environment["DIRACX_DB_URL_PILOTAGENTSDB"] = "mysql+aiomysql://user:sesame@127.0.0.1:1/pilots"
    if not default:
        refused = served("worker", "--module", "counting.py")
        assert refused.returncode == 1
        assert "cannot reach the database PilotAgentsDB" in refused.stderr.splitlines()[-1]
        return
    worker = served.start("worker", "--module", "counting.py")
    worker.until("ready")
    [line] = [line for line in worker.output.splitlines() if "PilotAgentsDB" in line]
    assert "WARNING" in line
    assert "cannot reach the database PilotAgentsDB" in line
    assert "sesame" not in worker.output


def test_unknown_names_in_the_configuration_are_reported(served, tmp_path):
    (tmp_path / "tasks.yaml").write_text("common: {'my_tasks:Gret': {concurrency_limit: 3}}")
    served.environment["DIRACX_TASKS_CONFIG"] = "tasks.yaml"
    worker = served.start("worker", "--module", "my_tasks.py")
    worker.until("ready")
    assert "common.my_tasks:Gret: unknown task (did you mean 'my_tasks:Greet'?)" in worker.output


@pytest.mark.parametrize("command", ["worker", "scheduler"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("common: {'my_tasks:Greet': {concurrency_limit: -3}}", ["concurrency_limit", "-3"]),
        ("common: [", ["not valid YAML"]),
        (None, ["No such file"]),
    ],
)
def test_a_configuration_that_is_wrong_is_reported_in_one_line(served, one_line, tmp_path, command, text, said):
    if text is not None:
        (tmp_path / "tasks.yaml").write_text(text)
    served.environment["DIRACX_TASKS_CONFIG"] = "tasks.yaml"
    one_line(served.mine(command), 1, "tasks.yaml", *said)


def test_P46_a_start_reports_all_that_is_wrong_with_the_configuration(served, tmp_path):
    (tmp_path / "tasks.yaml").write_text(
        "common:\n  Tick:\n    periodic: {schedule: nope}\n    instances: {a: {args: {b: 1}}}\n  Gret: {}\n"
    )
    served.environment["DIRACX_TASKS_CONFIG"] = "tasks.yaml"
    ended = served.mine("scheduler")
    assert ended.returncode == 1
    *found, last = ended.stderr.splitlines()
    assert [line.split(": ")[:2] for line in found] == [
        ["tasks.yaml:3", "common.Tick.periodic.schedule"],
        ["tasks.yaml:4", "common.Tick.instances.a.args.b"],
        ["tasks.yaml:5", "common.Gret"],
    ]
    assert last == "error: the configuration of tasks is wrong in 3 places"


def test_a_diracx_configuration_that_cannot_be_read_is_reported_in_one_line(served, one_line):
    served.environment["DIRACX_CONFIG_BACKEND_URL"] = "git+https://user:sesame@127.0.0.1:1/config"
    line = one_line(served.mine("scheduler"), 1, "DIRACX_CONFIG_BACKEND_URL", "git+https://user:***@127.0.0.1:1")
    assert "sesame" not in line


def test_the_scheduler_starts_periodic_tasks_and_logs_excluded_ones(served):
    served.environment["PYTHONUNBUFFERED"] = "1"
    scheduler = served.start("scheduler", "--module", "my_tasks.py")
    worker = served.start("worker", "--module", "my_tasks.py")
    worker.until("tick\n")
    (line,) = [line for line in scheduler.output.splitlines() if "DIRACX_CONFIG_BACKEND_URL" in line]
    assert "my_tasks:TickPerVo" in line
    for process in (scheduler, worker):
        process.process.terminate()
        assert process.ends() == 0, process.output


def test_the_scheduler_starts_vo_aware_tasks_for_every_vo_of_the_configuration(served, tmp_path):
    repository = tmp_path / "config"
    repository.mkdir()
    vo = """{IdP: {URL: "https://idp.example.org", ClientID: x}, DefaultGroup: users, Users: {},
             Groups: {users: {Properties: [NormalUser], Users: []}}}"""
    (repository / "default.yml").write_text(
        f"DIRAC: {{}}\nOperations: {{}}\nRegistry:\n  lhcb: {vo}\n  cms: {vo}\n"
        "Systems: {Tasks: {common: {'my_tasks:Tick': {enabled: false}}}}\n"
    )
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q", "-b", "master"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    served.environment["DIRACX_CONFIG_BACKEND_URL"] = f"git+file://{repository}"
    served.environment["PYTHONUNBUFFERED"] = "1"
    scheduler = served.start("scheduler", "--module", "my_tasks.py")
    worker = served.start("worker", "--module", "my_tasks.py")
    worker.until("tick of lhcb\n")
    worker.until("tick of cms\n")
    assert "tick\n" not in worker.output
    for process in (scheduler, worker):
        process.process.terminate()
        assert process.ends() == 0, process.output


@pytest.mark.parametrize("command", ["worker", "scheduler"])
def test_a_process_that_has_lost_its_server_can_be_stopped(cli, command):
    from diracx.tasks.testing import embedded_redis

    with embedded_redis() as url:
        process = cli.start(command, "--redis-url", url, "--module", "my_tasks.py")
        process.until("ready")
    process.until("trying again")
    process.process.terminate()
    assert process.ends() == 0, process.output


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--worker-size", "huge"], ["--worker-size", "'huge'", "'small', 'medium', 'large'"]),
        (["--max-concurrent-tasks", "0"], ["--max-concurrent-tasks", "'0'"]),
        (["--max-concurrent-tasks", "many"], ["--max-concurrent-tasks", "'many'"]),
        (["--worker-sise", "small"], ["--worker-sise", "--worker-size"]),
        (["--result-ttl", "0"], ["--result-ttl"]),
        (["--result-ttl", "315576001"], ["--result-ttl", "315576000"]),
        (["--lease-seconds", "1e7"], ["--lease-seconds", "86400"]),
        (["--lease-seconds", "inf"], ["--lease-seconds", "86400"]),
    ],
)
def test_an_invalid_option_is_reported_in_one_line(cli, one_line, args, said):
    one_line(cli("worker", *args), 2, *said)
