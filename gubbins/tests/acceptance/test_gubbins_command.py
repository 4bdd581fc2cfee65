"""The command `gubbins`."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from diracx.tasks.operations.audit import AuditEntry, read_audit, user_at_host
from redis.asyncio import Redis
from support.broken_databases import PASSWORD, Troubled
from support.paths import ROOT
from support.warm_commands import WarmCommands

from gubbins.db.sql import MyPilotDB
from gubbins.logic.my_pilots import submit_pilot

Run = Callable[..., subprocess.CompletedProcess[str]]
EXAMPLE = ROOT / "gubbins" / "examples" / "ces.yaml"


def submit(url: str) -> str:
    """Submit a pilot there, without a command; returns its number."""

    async def submitted() -> int:
        db = MyPilotDB(url)
        async with db.engine_context():
            return await submit_pilot(db, "flaky.example.org", "lhcb")

    return str(asyncio.run(submitted()))


@pytest.fixture
def run(sqlite_url: str, warm_commands: WarmCommands) -> Run:
    def _run(*args: str, url: str | None = sqlite_url, stdin: str = "", redis: str | None = None) -> Any:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DIRACX_")}
        if url is not None:
            environment["DIRACX_DB_URL_MYPILOTDB"] = url
        if redis is not None:
            environment["DIRACX_TASKS_REDIS_URL"] = redis
        return warm_commands.run(["gubbins", *args], env=environment, typed=stdin, timeout=60)

    return _run


@pytest.fixture
def initialised(run: Run) -> Run:
    assert run("db", "init").returncode == 0
    return run


def refused(result: subprocess.CompletedProcess[str], exit_code: int, *fragments: str) -> None:
    """Said on stderr in one line, and nothing on stdout."""
    assert result.returncode == exit_code, result
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("gubbins: ")
    for fragment in fragments:
        assert fragment in line


def test_a_first_session(run: Run, sqlite_url: str) -> None:
    assert "created" in run("db", "init").stdout
    assert json.loads(run("db", "init", "--json").stdout) == {"created": False}
    loaded = json.loads(run("ce", "load", str(EXAMPLE), "--json").stdout)
    assert set(loaded.values()) == {"created"}
    assert run("ce", "load", str(EXAMPLE)).stdout.count("unchanged") == 3
    ces = json.loads(run("ce", "list", "--json", "--vo", "gridpp").stdout)
    assert [ce["name"] for ce in ces] == ["reliable.example.org", "this-host"]
    assert "reliable.example.org" in run("ce", "list").stdout

    pilot_id = submit(sqlite_url)
    page = json.loads(run("pilots", "list", "--status", "submitted", "--json").stdout)
    assert [str(pilot["pilot_id"]) for pilot in page["items"]] == [pilot_id]
    summary = json.loads(run("pilots", "summary", "--json").stdout)
    assert summary == {"lhcb": {"flaky.example.org": {"SUBMITTED": 1}}}
    assert "flaky.example.org" in run("pilots", "summary").stdout
    shown = json.loads(run("pilots", "show", pilot_id, "--json").stdout)
    assert [step["status"] for step in shown["history"]] == ["SUBMITTED"]
    assert "History" in run("pilots", "show", pilot_id).stdout
    assert "cancellation requested" in run("pilots", "cancel", pilot_id).stdout


def test_ces_are_opened_closed_and_stay_closed(initialised: Run) -> None:
    run = initialised
    run("ce", "load", "-", stdin="compute_elements: [{name: a, capacity: 1}]")
    assert run("ce", "disable", "a").stdout == "a: disabled\n"
    assert run("ce", "disable", "a").stdout == "a: disabled already\n"
    # The file does not say `enabled`: what an operator has closed at night stays closed.
    assert run("ce", "load", "-", stdin="compute_elements: [{name: a, capacity: 2}]").stdout == "a: updated\n"
    assert json.loads(run("ce", "list", "--json").stdout)[0]["enabled"] is False
    assert json.loads(run("ce", "enable", "a", "--json").stdout)["changed"] is True
    refused(run("ce", "enable", "b"), 1, "'b'", "gubbins ce list")


def test_a_ce_is_shown_with_its_rules_and_banned_until_it_is_enabled(initialised: Run) -> None:
    run = initialised
    rules = "{max_waiting: 7, vos: {lhcb: {share: 2.5}}}"
    run("ce", "load", "-", stdin=f"compute_elements: [{{name: a, capacity: 1, rules: {rules}}}]")
    shown = json.loads(run("ce", "show", "a", "--json").stdout)
    assert (shown["rules"]["max_waiting"], shown["rules"]["timeout_seconds"]) == (7, 60)
    assert shown["circuits"]["status"]["state"] == "closed"
    text = run("ce", "show", "a").stdout
    for message in ("Circuits", "closed", "share of lhcb", "2.5", "keep_output"):
        assert message in text
    assert run("ce", "ban", "a", "--reason", "flood").stdout == "a: banned\n"
    assert run("ce", "ban", "a", "--reason", "flood").stdout == "a: banned already\n"
    assert "banned" in run("ce", "list").stdout
    assert "flood" in run("ce", "show", "a").stdout
    assert run("ce", "enable", "a").stdout == "a: enabled\n"
    assert json.loads(run("ce", "show", "a", "--json").stdout)["ban_reason"] is None
    refused(run("ce", "show", "b"), 1, "'b'", "gubbins ce list")
    refused(run("ce", "ban", "b"), 1, "'b'", "gubbins ce list")


def test_a_downtime_is_planned_listed_shown_and_removed(initialised: Run, redis_url: str) -> None:
    run = partial(initialised, redis=redis_url)
    run("ce", "load", "-", stdin="compute_elements: [{name: a, capacity: 1}]")
    assert run("ce", "downtime", "list").returncode == 0
    added = run("ce", "downtime", "add", "a", "--hours", "5", "--reason", "new switches")
    assert added.stdout.startswith("a: downtime 1, ")
    assert "downtime" in run("ce", "list").stdout
    assert "in downtime until" in run("ce", "show", "a").stdout
    [listed] = json.loads(run("ce", "downtime", "list", "a", "--json").stdout)
    assert (listed["id"], listed["ce_name"], listed["reason"]) == (1, "a", "new switches")
    assert "new switches" in run("ce", "downtime", "list").stdout
    assert json.loads(run("ce", "show", "a", "--json").stdout)["downtime"]["id"] == 1
    planned = ("--start", "2099-12-01T08:00", "--end", "2099-12-01T10:00+01:00", "--reason", "later")
    refused(run("ce", "downtime", "add", "a", *planned), 1, "starts within 366 days")
    assert run("ce", "downtime", "remove", "1").stdout.startswith("a: downtime 1 removed")
    assert "in downtime" not in run("ce", "show", "a").stdout
    refused(run("ce", "downtime", "remove", "1"), 1, "no downtime 1", "gubbins ce downtime list")
    refused(run("ce", "downtime", "add", "b", "--hours", "5", "--reason", "x"), 1, "'b'", "gubbins ce list")
    refused(run("ce", "downtime", "add", "a", "--reason", "x"), 2, "either --end or --hours")
    last_day = ("--start", "9999-12-31", "--hours", "48", "--reason", "x")
    refused(run("ce", "downtime", "add", "a", *last_day), 2, "cannot start at 9999-12-31")
    refused(run("ce", "downtime", "add", "a", "--end", "soon", "--reason", "x"), 2, "'soon' is no time like")

    async def look() -> list[AuditEntry]:
        async with Redis.from_url(redis_url) as client:
            return await read_audit(client)

    done = [(entry.action, entry.target) for entry in asyncio.run(look())[::-1] if entry.ok]
    assert done == [("load compute elements", "a"), ("add downtime", "a"), ("remove downtime", "1")]


SITES = """
Resources
{
  Sites
  {
    DIRAC
    {
      DIRAC.Example.org
      {
        CEs
        {
          host.example.org
          {
            CEType = SSH
            SSHUser = pilot
            SSHPassword = s3cret
            MaxTotalJobs = 8
            VO = lhcb
          }
        }
      }
    }
  }
}
"""


def test_a_configuration_of_dirac_becomes_a_file_to_load(initialised: Run, tmp_path: Path) -> None:
    run = initialised
    source, target = tmp_path / "dirac.cfg", tmp_path / "ces.yaml"
    source.write_text(SITES)
    made = run("ce", "import-dirac", str(source), "--output", str(target), "--share", "0.5")
    assert made.stdout == f"{target}: 1 compute elements, 1 remarks\n"
    where = "Resources/Sites/DIRAC/DIRAC.Example.org/CEs/host.example.org/SSHPassword"
    assert made.stderr == f"{where}: has no counterpart\n"
    assert run("ce", "load", str(target)).stdout == "host.example.org: created\n"
    assert json.loads(run("ce", "show", "host.example.org", "--json").stdout)["capacity"] == 4
    refused(run("ce", "import-dirac", str(source), "--output", str(target)), 2, str(target), "File exists")
    shown = run("ce", "import-dirac", "-", stdin=SITES)
    assert shown.stdout.startswith("compute_elements:\n- name: host.example.org\n")
    reported = json.loads(run("ce", "import-dirac", "-", "--json", stdin=SITES).stdout)
    assert [remark["path"] for remark in reported["remarks"]] == [where]
    assert "s3cret" not in shown.stdout + shown.stderr + str(reported)
    refused(run("ce", "import-dirac", "-", stdin="Resources\n{\n"), 2, "not a configuration of DIRAC")
    refused(run("ce", "import-dirac", "-", stdin=""), 1, "Resources/Sites")
    refused(run("ce", "import-dirac", str(tmp_path / "none.cfg")), 2, "cannot read", "No such file")


def test_actions_are_in_the_audit_log_of_the_task_system(initialised: Run, redis_url: str) -> None:
    run = partial(initialised, redis=redis_url)
    ces = "compute_elements: [{name: a, capacity: 1}, {name: b, capacity: 1}]"
    assert run("ce", "load", "-", stdin=ces).stderr == ""
    run("ce", "disable", "a")
    run("ce", "disable", "a")
    run("ce", "ban", "a", "--reason", "flood")
    run("ce", "enable", "a")
    refused(run("ce", "enable", "c"), 1, "'c'")
    refused(run("pilots", "cancel", "7"), 1, "unknown pilot 7")
    run("ce", "list")

    async def look() -> list[AuditEntry]:
        async with Redis.from_url(redis_url) as client:
            return await read_audit(client)

    entries = asyncio.run(look())[::-1]
    assert {(entry.who, entry.via) for entry in entries} == {(user_at_host(), "cli")}
    assert [(entry.action, entry.target, entry.ok, entry.outcome) for entry in entries[:5]] == [
        ("load compute elements", "2: a, b", True, "2 created"),
        ("close compute element", "a", True, "closed"),
        ("close compute element", "a", True, "was closed already"),
        ("ban compute element", "a", True, "banned: flood"),
        ("open compute element", "a", True, "open"),
    ]
    assert [(entry.action, entry.target, entry.ok) for entry in entries[5:]] == [
        ("open compute element", "c", False),
        ("cancel pilot", "7", False),
    ]


def test_an_action_is_done_without_an_audit_log_and_refused_with_a_broken_one(initialised: Run) -> None:
    initialised("ce", "load", "-", stdin="compute_elements: [{name: a, capacity: 1}]")
    unwritten = initialised("ce", "disable", "a")
    assert unwritten.stdout == "a: disabled\n"
    assert unwritten.stderr == "gubbins: not written to the audit log: DIRACX_TASKS_REDIS_URL is not set\n"
    dead = initialised("ce", "enable", "a", redis="redis://:sesame@127.0.0.1:1")
    refused(dead, 1, "the audit log cannot be written", "unset it to work without")
    assert "sesame" not in dead.stderr
    assert json.loads(initialised("ce", "list", "--json").stdout)[0]["enabled"] is False


def test_output_of_a_pilot_goes_where_it_was_written(initialised: Run, sqlite_url: str, tmp_path: Path) -> None:
    settings = f"{{directory: {tmp_path}/ce, default_script: 'echo out; echo err >&2'}}"
    ce = f"{{name: flaky.example.org, capacity: 1, backend: local, settings: {settings}}}"
    assert initialised("ce", "load", "-", stdin=f"compute_elements: [{ce}]").returncode == 0
    pilot_id = submit(sqlite_url)
    deadline = time.monotonic() + 30
    while (shown := initialised("pilots", "output", pilot_id)).stderr != "err\n":
        assert time.monotonic() < deadline, shown
    assert (shown.returncode, shown.stdout) == (0, "out\n")
    refused(initialised("pilots", "output", "7"), 1, "unknown pilot 7")


def test_an_invalid_file_is_refused_with_all_errors(initialised: Run) -> None:
    text = """
compute_elements:
  - {name: fine, capacity: 1}
  - {name: a, capacity: -1}
  - {name: b, capacity: 1, success_rate: 1.5, speed: 9}
"""
    result = initialised("ce", "load", "-", stdin=text)
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    for line, path in zip(sorted(lines), ("[1].capacity", "[2].speed", "[2].success_rate"), strict=True):
        assert f"compute_elements{path}: " in line
    assert json.loads(initialised("ce", "list", "--json").stdout) == []


def test_usage_errors_are_one_line_and_exit_code_2(run: Run) -> None:
    refused(run("pilots", "show", "x"), 2, "'ID'")
    refused(run("pilots", "list", "--status", "LOST"), 2, "--status")
    refused(run("pilots", "list", "--page", "0"), 2, "--page")
    refused(run("frobnicate"), 2, "frobnicate")
    refused(run("ce", "load"), 2, "FILE")
    refused(run("ce", "load", "/nonexistent.yaml"), 2, "/nonexistent.yaml")


def test_a_database_error_is_reported_in_one_line_with_the_remedy(run: Run) -> None:
    refused(run("ce", "list", url=None), 1, "DIRACX_DB_URL_MYPILOTDB is not set")
    refused(run("ce", "list"), 1, "gubbins db init")
    refused(run("ce", "load", str(EXAMPLE)), 1, "gubbins db init")
    refused(run("ce", "list", url="sqlite+aiosqlite:////nonexistent/x.db"), 1, "unable to open")
    refused(run("ce", "list", url="invalid"), 1, "DIRACX_DB_URL_MYPILOTDB")
    refused(run("ce", "list", url="mysql+nodriver://u:secret@127.0.0.1:1/x"), 1, "DIRACX_DB_URL_MYPILOTDB")
    down = run("db", "init", url="mysql+aiomysql://u:secret@127.0.0.1:1/x")
    refused(down, 1, "DIRACX_DB_URL_MYPILOTDB")
    assert "secret" not in down.stderr


COMMANDS = (
    *("ce list", "ce show a", "ce enable a", "ce disable a", "ce ban a", "pilots list", "pilots summary"),
    *("pilots show 1", "pilots cancel 1", "pilots output 1", "db init", "db current", "db upgrade"),
    *("db downgrade base --yes", f"ce load {EXAMPLE}"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_reports_a_missing_database_in_one_line(run: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "another").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    refused(run(*command.split(), url=f"sqlite+aiosqlite:///{tmp_path}/another"), 1, "is not an SQLite database")


def test_every_database_error_is_reported_in_one_line(run: Run, troubled_database: Troubled) -> None:
    troubled = asyncio.run(troubled_database(MyPilotDB.migrations))
    for command in ("ce list", "db current", "db upgrade"):
        response = run(*command.split(), url=troubled.url)
        if command.startswith("db") and response.returncode == 0:
            continue  # it resolves this error
        refused(response, 1, *troubled.says)
        assert PASSWORD not in response.stderr


def test_db_upgrade_and_downgrade_report_their_steps(run: Run) -> None:
    assert run("db", "current", "--check").returncode == 1
    up = json.loads(run("db", "upgrade", "--json").stdout)
    assert (up["before"], up["after"]) == (None, up["steps"][-1]["revision"])
    newest = up["after"]
    assert json.loads(run("db", "upgrade", "--json").stdout)["steps"] == []
    refused(run("db", "downgrade", "base"), 2, "--yes")
    down = json.loads(run("db", "downgrade", "base", "--yes", "--json").stdout)
    assert (down["before"], down["after"], down["steps"][0]["revision"]) == (newest, None, newest)
    current = run("db", "current")
    assert f"at base: it has no tables, needed: {newest}" in current.stdout
    assert f"to do: {newest}" in current.stdout
    refused(run("db", "upgrade", "no such"), 1, "no revision 'no such'", "0007")
    assert run("db", "upgrade").stdout.endswith(f"MyPilotDB is at {newest}\n")
    assert json.loads(run("db", "current", "--check", "--json").stdout)["pending"] == []
    assert run("ce", "list").returncode == 0


def test_an_unknown_pilot_is_an_error_of_one_line(initialised: Run) -> None:
    refused(initialised("pilots", "show", "7"), 1, "unknown pilot 7")
    refused(initialised("pilots", "cancel", "7"), 1, "unknown pilot 7")


def test_the_help_shows_the_first_steps(run: Run) -> None:
    assert "gubbins ce load ces.yaml" in run("--help").stdout
    assert "vos: [lhcb, dteam]" in run("ce", "load", "--help").stdout
    assert "gubbins db upgrade" in run("db", "--help").stdout


@pytest.mark.parametrize("group", [(), ("ce",), ("ce", "downtime"), ("pilots",), ("db",)])
def test_the_help_of_a_group_has_a_whole_sentence_for_each_command(run: Run, group: tuple[str, ...]) -> None:
    _, _, commands = run(*group, "--help").stdout.partition("Commands:\n")
    lines = commands.splitlines()
    assert len(lines) >= 3
    assert [line for line in lines if not line.endswith(".") or line.endswith("...")] == []
