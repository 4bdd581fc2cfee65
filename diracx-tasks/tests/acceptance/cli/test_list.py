"""`list`, `--module`, `--help`, `--version` and program names."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support.distributions import install_distribution


def test_list_describes_each_task(cli):
    result = cli.mine("list", "--json")
    assert result.returncode == 0, result.stderr
    rows = {row.pop("name"): row for row in json.loads(result.stdout)}
    assert rows["my_tasks:Urgent"] == {
        "kind": "one-shot",
        "priority": "realtime",
        "size": "small",
        "schedule": None,
        "enabled": True,
        "retry": "2 times, first after 3 s",
        "dlq_eligible": True,
        "arguments": "()",
        "module": "my_tasks",
    }
    assert rows["my_tasks:Greet"]["arguments"] == "(name: str, times: int = 1)"
    assert (rows["my_tasks:Tick"]["kind"], rows["my_tasks:Tick"]["schedule"]) == ("periodic", "every 0.2 s")
    assert rows["my_tasks:TickPerVo"]["kind"] == "periodic, per VO"
    assert "jobs:CleanSandboxStoreTask" in rows


def test_list_is_a_table_with_complete_names(cli):
    result = cli.mine("list")
    assert result.returncode == 0
    for text in ("my_tasks:TickPerVo", "realtime", "every 0.2 s", "(name: str, times: int = 1)"):
        assert text in result.stdout


def test_a_module_may_be_named_as_python_does(cli):
    package = cli.directory / "mine" / "deep"
    package.mkdir(parents=True)
    (package / "work.py").write_text((cli.directory / "my_tasks.py").read_text())
    result = cli("list", "--json", "--module", "mine.deep.work")
    assert "work:Greet" in {row["name"] for row in json.loads(result.stdout)}


def test_a_file_of_tasks_in_another_directory_can_import_its_neighbours(cli):
    elsewhere = cli.directory / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "helper_of_tasks.py").write_text("from my_base_of_tasks import *")
    (elsewhere / "my_base_of_tasks.py").write_text("from diracx.tasks.plumbing import BaseTask")
    (elsewhere / "far.py").write_text("from helper_of_tasks import BaseTask\nclass Far(BaseTask): ...\n")
    result = cli("list", "--json", "--module", "elsewhere/far.py")
    assert "far:Far" in {row["name"] for row in json.loads(result.stdout)}, result.stderr


@pytest.mark.parametrize(
    ("name", "text", "code", "said"),
    [
        ("missing.py", None, 2, ["missing.py", "no such file"]),
        ("no.such.module", None, 2, ["no.such.module", "no such module"]),
        ("empty.py", "", 2, ["empty.py", "no task"]),
        ("json.py", "", 2, ["json.py", "'json'", "rename"]),
        ("broken.py", "\n1 / 0\n", 1, ["broken.py:2", "ZeroDivisionError"]),
        ("wrong.py", "def", 1, ["wrong.py", "SyntaxError"]),
        ("leaves.py", "raise SystemExit(0)", 1, ["leaves.py", "SystemExit"]),
    ],
)
def test_a_module_that_cannot_be_used_is_reported_in_one_line(cli, one_line, name, text, code, said):
    if text is not None:
        (cli.directory / name).write_text(text)
    one_line(cli("list", "--module", name), code, "--module", *said)


@pytest.mark.parametrize(
    "program",
    [
        (f"{sys.prefix}/bin/diracx-task-run",),
        (f"{sys.prefix}/bin/diracx-tasks",),
        (sys.executable, "-m", "diracx.tasks"),
        (sys.executable, "-m", "diracx.tasks.task_run"),
    ],
    ids=lambda program: program[-1].rpartition("/")[2],
)
def test_every_name_of_the_program_is_the_same_program(cli, program):
    from importlib.metadata import version

    result = cli("--version", program=program)
    assert (result.returncode, result.stdout) == (0, f"diracx-tasks {version('diracx-tasks')}\n")


@pytest.mark.parametrize("command", ["call", "submit", "worker", "scheduler", "list", "dev"])
def test_the_help_of_every_command_has_an_example(cli, command):
    result = cli(command, "--help")
    assert result.returncode == 0
    assert f"Example: diracx-task-run {command}" in result.stdout


def test_the_paragraphs_of_a_help_fill_their_lines(cli):
    assert " Systems.Tasks, or the file DIRACX_TASKS_CONFIG. " in cli("worker", "--help").stdout


def test_help_loads_nothing_heavy():
    program = """
import sys
from diracx.tasks.cli import main
sys.argv = ["diracx-task-run", "--help"]
try:
    main()
finally:
    heavy = {"redis", "sqlalchemy", "fastapi", "diracx.db", "diracx.core"} & sys.modules.keys()
    assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_an_unknown_command_is_reported_in_one_line(cli, one_line):
    one_line(cli("wrker"), 2, "'wrker'", "'worker'")


def install_task(cli, module: str, code: str, entry_point: str) -> None:
    install_distribution(cli.directory / "site", module, code, {"diracx.tasks.mine": entry_point})
    cli.environment["PYTHONPATH"] = str(cli.directory / "site")


@pytest.mark.parametrize("code", ["raise ValueError('too old')", "import sys\nsys.exit('too old')"])
def test_a_task_whose_import_fails_is_named_in_one_line(cli, one_line, code: str) -> None:
    install_task(cli, "diracx.broken", code, "Broken = Broken")
    one_line(cli("list"), 1, "entry point 'Broken' of diracx.tasks.mine (diracx.broken:Broken) ", "too old")


def test_a_task_has_the_name_of_its_class_whatever_its_entry_point_is_called(cli) -> None:
    code = "from diracx.tasks.plumbing import BaseTask\nclass Named(BaseTask):\n    async def execute(self): ...\n"
    install_task(cli, "diracx.named", code, "other = Named")
    names = {row["name"] for row in json.loads(cli("list", "--json").stdout)}
    assert "mine:Named" in names
    assert "mine:other" not in names


def test_tasks_of_a_distribution_that_is_no_extension_are_left_out_with_a_warning(cli):
    code = "from diracx.tasks.plumbing import BaseTask\nclass Lost(BaseTask): ...\n"
    install_task(cli, "no_extension", code, "Lost = Lost")
    result = cli("list", "--json")
    assert "mine:Lost" not in {row["name"] for row in json.loads(result.stdout)}
    [line] = [line for line in result.stderr.splitlines() if "warning" in line]
    for message in ("no-extension", "mine:Lost", "entry point `extension` of the group `diracx`", "--module"):
        assert message in line
    del cli.environment["PYTHONPATH"]
    assert cli("list").stderr == ""


def test_a_task_can_be_named_by_its_class_only(cli, one_line):
    (cli.directory / "other.py").write_text((cli.directory / "my_tasks.py").read_text())
    cli.environment["DIRACX_TASKS_REDIS_URL"] = "redis://127.0.0.1:1"
    shown = cli("config", "show", "--task", "Greet", "--module", "my_tasks.py", "--json")
    assert [row["task"] for row in json.loads(shown.stdout)["tasks"]] == ["my_tasks:Greet"]
    for command in (("call", "Greet"), ("submit", "Greet"), ("config", "show", "--task", "Greet")):
        both = cli(*command, "--module", "my_tasks.py", "--module", "other.py")
        one_line(both, 2, "'Greet' is ambiguous; write my_tasks:Greet or other:Greet")


@pytest.mark.parametrize("group", ["locks", "schedule", "queue", "config", "dlq"])
def test_a_group_of_commands_without_a_command_prints_its_help(cli, group: str) -> None:
    shown = cli(group)
    assert shown.returncode == 2
    assert "Usage: " in shown.stdout + shown.stderr
    assert "error" not in shown.stderr
