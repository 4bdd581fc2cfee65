"""`config check` and `config show`, as operators use them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

GOOD = """\
common:
  my_tasks:Greet: {concurrency_limit: 3}
  TickPerVo:
    periodic: {schedule: "0 6 * * *", timezone: Europe/Zurich, missed: skip}
    instances:
      early:
      late:
        periodic: {interval_seconds: 60}
vo_overrides:
  lhcb:
    TickPerVo:
      instances:
        late: {enabled: false}
limits:
  task:
    default: {rate_limit: 10, rate_window_seconds: 60}
    keys:
      Slow: {concurrency_limit: 1}
"""

BAD = """\
common:
  my_tasks:Gret: {concurrency_limit: 3}
  Tick:
    enabld: false
    periodic: {schedule: nope}
    instances: {a: {args: {b: 1}}}
  Slow: {rate_limit: 0}
limits:
  tsak: {}
"""


@pytest.fixture
def written(cli, tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / "tasks.yaml").write_text(text)
        return "tasks.yaml"

    return write


@pytest.fixture
def systems_tasks(cli, tmp_path: Path) -> Callable[[str], None]:
    """Write the section of a DiracX configuration with the VO lhcb."""

    def write(section: str) -> None:
        repository = tmp_path / "config"
        repository.mkdir()
        vo = (
            "{IdP: {URL: 'https://idp.invalid', ClientID: x}, DefaultGroup: user, Users: {}, "
            "Groups: {user: {Properties: [], Users: []}}}"
        )
        (repository / "default.yml").write_text(
            f"DIRAC: {{}}\nOperations: {{}}\nRegistry: {{lhcb: {vo}}}\nSystems: {{Tasks: {section}}}\n"
        )
        git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
        for command in (["init", "-q", "-b", "master"], ["add", "."], ["commit", "-qm", "x"]):
            subprocess.run([*git, *command], cwd=repository, check=True)
        cli.environment["DIRACX_CONFIG_BACKEND_URL"] = f"git+file://{repository}"

    return write


def test_a_valid_file_is_reported_in_one_line(cli, written):
    ended = cli.mine("config", "check", written(GOOD))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "tasks.yaml is valid; VOs were not checked, set DIRACX_CONFIG_BACKEND_URL\n"


def test_P46_all_mistakes_are_in_one_report_with_lines_and_paths(cli, written):
    ended = cli.mine("config", "check", written(BAD))
    assert (ended.returncode, ended.stdout) == (1, "")
    *found, last = ended.stderr.splitlines()
    assert last == "error: tasks.yaml has 6 mistakes"
    assert [tuple(line.split(": ")[:2]) for line in found] == [
        ("tasks.yaml:2", "common.my_tasks:Gret"),
        ("tasks.yaml:4", "common.Tick.enabld"),
        ("tasks.yaml:5", "common.Tick.periodic.schedule"),
        ("tasks.yaml:6", "common.Tick.instances.a.args.b"),
        ("tasks.yaml:7", "common.Slow.rate_limit"),
        ("tasks.yaml:9", "limits.tsak"),
    ]
    assert "did you mean 'my_tasks:Greet'?" in found[0]
    assert "did you mean 'enabled'?" in found[1]
    assert "did you mean 'task'?" in found[-1]


def test_a_script_gets_the_report_as_json(cli, written):
    ended = cli.mine("config", "check", "--json", written(BAD))
    assert ended.returncode == 1
    report = json.loads(ended.stdout)
    assert (report["source"], report["valid"]) == ("tasks.yaml", False)
    by_path = {problem["path"]: problem for problem in report["problems"]}
    assert by_path["common.my_tasks:Gret"]["line"] == 2
    assert by_path["common.my_tasks:Gret"]["prevents_start"] is False
    assert by_path["common.Tick.enabld"]["prevents_start"] is True
    good = json.loads(cli.mine("config", "check", "--json", written(GOOD)).stdout)
    assert good == {"source": "tasks.yaml", "valid": True, "problems": []}
    broken = cli.mine("config", "check", "--json", written("common: ["))
    [problem] = json.loads(broken.stdout)["problems"]
    assert "not valid YAML" in problem["message"]


def test_without_a_file_the_environment_names_the_source(cli, written, one_line):
    assert cli("config", "check").stdout == "nothing is configured: all is as in the code\n"
    cli.environment["DIRACX_TASKS_CONFIG"] = written("common: {Tick: {max_retries: -1}}")
    assert "tasks.yaml:1: common.Tick.max_retries" in cli.mine("config", "check").stderr
    one_line(cli("config", "check", "nowhere.yaml"), 2, "nowhere.yaml", "no such file")


def test_show_has_every_value_and_its_source(cli, written):
    shown = json.loads(cli.mine("config", "show", written(GOOD), "--json").stdout)
    tasks = {(record["task"].partition(":")[2], record["vo"]): record for record in shown["tasks"]}
    assert (shown["source"], shown["vos"]) == ("tasks.yaml", None)
    greet = tasks["Greet", None]["settings"]
    assert greet["concurrency_limit"] == {
        "value": 3,
        "from": "common",
        "path": "common.my_tasks:Greet.concurrency_limit",
        "line": 2,
    }
    assert (greet["rate_limit"]["value"], greet["rate_limit"]["from"]) == (10, "limits")
    assert (greet["rate_limit"]["path"], greet["rate_limit"]["line"]) == ("limits.task.default.rate_limit", 16)
    assert greet["max_retries"] == {"value": 0, "from": "code", "path": None, "line": None}
    assert tasks["Slow", None]["settings"]["concurrency_limit"]["line"] == 18
    assert tasks["Urgent", None]["settings"]["retry_base_delay_seconds"]["value"] == 3
    assert tasks["Tick", None]["settings"]["schedule"]["value"] == "every 0.2 s"

    early, late = tasks["TickPerVo", None]["instances"].values()
    assert early["schedule"]["value"] == "cron 0 6 * * * (Europe/Zurich)"
    assert (early["missed"]["value"], early["missed"]["from"]) == ("skip", "common")
    assert (late["schedule"]["value"], late["schedule"]["line"]) == ("every 60 s", 8)
    assert late["enabled"]["value"] is True
    of_lhcb = tasks["TickPerVo", "lhcb"]["instances"]["late"]["enabled"]
    assert (of_lhcb["value"], of_lhcb["from"], of_lhcb["line"]) == (False, "vo lhcb", 13)
    assert [(limit["object"], limit["key"]) for limit in shown["limits"]] == [("task", None), ("task", "Slow")]


def test_show_prints_a_table(cli, written):
    table = cli.mine("config", "show", written(GOOD), "--task", "TickPerVo", "--vo", "lhcb").stdout
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["task", "setting", "value", "from"]
    off = ["my_tasks:TickPerVo@late", "for", "lhcb", "enabled", "no", "vo", "lhcb,", "tasks.yaml:13"]
    assert off in lines
    assert ["priority", "normal", "code"] in lines
    assert "my_tasks:Greet" not in table
    assert "limits of task Slow" in cli.mine("config", "show", written(GOOD)).stdout


def test_show_refuses_a_wrong_file_and_an_unknown_vo(cli, written):
    ended = cli.mine("config", "show", written(BAD))
    assert ended.returncode == 1
    assert "tasks.yaml:4: common.Tick.enabld: unknown field" in ended.stderr
    unknown = cli.mine("config", "show", written(GOOD), "--task", "Gret")
    assert unknown.returncode == 1
    assert unknown.stderr.endswith("error: unknown task 'Gret'; did you mean 'my_tasks:Greet'?\n")


def test_systems_tasks_is_checked_with_the_vos_of_its_configuration(cli, systems_tasks, one_line):
    systems_tasks("{vo_overrides: {lchb: {TickPerVo: {enabled: false}}}}")
    ended = cli.mine("config", "check")
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [
        "Systems.Tasks: vo_overrides.lchb: unknown VO (did you mean 'lhcb'?)",
        "error: Systems.Tasks has 1 mistake",
    ]
    one_line(cli.mine("config", "show", "--vo", "cms"), 2, "no such VO; known VOs: lhcb")
    shown = cli.mine("config", "show", "--vo", "lhcb", "--task", "TickPerVo")
    assert shown.returncode == 0
    assert "warning: Systems.Tasks: vo_overrides.lchb: unknown VO" in shown.stderr
