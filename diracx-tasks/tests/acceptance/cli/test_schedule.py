"""The command `schedule`, with real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from diracx.tasks.plumbing.broker import keys
from redis import Redis

STREAM = "diracx:tasks:normal:medium"

CONFIG = """
common:
  my_tasks:Tick: {periodic: {interval_seconds: 3600}}
  my_tasks:TickPerVo: {enabled: false}
  jobs:CleanSandboxStoreTask: {enabled: false}
"""


@pytest.fixture
def server(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client
        client.flushall()


@pytest.fixture
def operated(served):
    (served.directory / "tasks.yaml").write_text(CONFIG)
    served.environment["DIRACX_TASKS_CONFIG"] = str(served.directory / "tasks.yaml")
    return served


def listed(cli, *ids: str) -> dict[str, dict]:
    result = cli("schedule", "list", *ids, "--json", "--module", "my_tasks.py")
    assert result.returncode == 0, result.stderr
    return {row["id"]: row for row in json.loads(result.stdout)}


def test_schedule_list_shows_state_runs_outcome_and_source(operated, server, wait_until):
    assert listed(operated, "my_tasks:Tick")["my_tasks:Tick"]["state"] == "unplanned"
    assert "no scheduler leads" in operated("schedule", "list", "--module", "my_tasks.py").stderr
    operated.start("scheduler", "--module", "my_tasks.py").until("leading")
    wait_until(lambda: server.zscore(keys.NEXT_RUNS, "my_tasks:Tick"), "it is planned")
    row = listed(operated)["my_tasks:Tick"]
    assert (row["state"], row["rule"], row["source"], row["missed"]) == (
        "active",
        "every 3600 s",
        "common",
        "once",
    )
    assert row["next_run"].endswith("+00:00")
    assert row["last_run"] is row["outcome"] is row["activity"] is None
    off = listed(operated)["jobs:CleanSandboxStoreTask"]
    assert (off["state"], off["next_run"], off["source"]) == ("disabled", None, "common")

    task_id = operated("schedule", "run-now", "my_tasks:Tick", "--module", "my_tasks.py").stdout.strip()
    assert listed(operated)["my_tasks:Tick"]["activity"] == "waiting"
    operated.start("worker", "--module", "my_tasks.py").until("tick")
    wait_until(lambda: listed(operated)["my_tasks:Tick"]["outcome"], "the outcome is kept")
    ran = listed(operated)["my_tasks:Tick"]
    assert (ran["outcome"]["ok"], ran["outcome"]["task_id"], ran["last_task_id"]) == (True, task_id, task_id)
    assert (ran["next_run"], ran["activity"]) == (row["next_run"], None), "run-now leaves the next run as it is"
    text = operated("schedule", "list", "my_tasks:*", "--module", "my_tasks.py").stdout
    assert "my_tasks:Tick" in text
    assert "ok, " in text
    assert "every 3600 s" in text
    assert "jobs:" not in text


def test_run_now_works_without_a_leader_and_reports_a_pending_occurrence(operated, server, one_line):
    first = operated.mine("schedule", "run-now", "my_tasks:Tick")
    assert first.returncode == 0, first.stderr
    again = operated.mine("schedule", "run-now", "my_tasks:Tick")
    one_line(again, 1, "my_tasks:Tick", first.stdout.strip(), "still waits")
    assert server.xlen(STREAM) == 1


def test_pause_and_resume_are_kept_in_redis_and_shown_everywhere(operated, server, wait_until):
    assert operated.mine("schedule", "pause", "my_tasks:Tick").stdout == "my_tasks:Tick  paused\n"
    assert operated.mine("schedule", "pause", "*:Tick").stdout == "my_tasks:Tick  no change\n"
    operated.start("scheduler", "--module", "my_tasks.py").until("leading")
    wait_until(lambda: server.zscore(keys.NEXT_RUNS, "my_tasks:Tick"), "it is planned")
    row = listed(operated)["my_tasks:Tick"]
    assert (row["state"], row["next_run"]) == ("paused", None)
    assert row["paused_since"]
    result = operated.mine("schedule", "resume", "--all", "--json")
    assert {"id": "my_tasks:Tick", "changed": True} in json.loads(result.stdout)
    assert listed(operated)["my_tasks:Tick"]["state"] == "active"
    assert not server.exists(keys.PAUSED)


@pytest.mark.parametrize("command", ["run-now", "pause", "resume", "list"])
def test_an_unknown_schedule_is_reported_in_one_line_with_the_nearest(operated, one_line, command):
    one_line(operated.mine("schedule", command, "my_tasks:Tik"), 2, "'my_tasks:Tik'", "'my_tasks:Tick'")


@pytest.mark.leaves_keys("diracx:*")
def test_a_schedule_is_named_without_its_category_too(operated, one_line):
    submitted = json.loads(operated.mine("schedule", "run-now", "Tick", "--json").stdout)
    assert submitted["id"] == "my_tasks:Tick"
    one_line(operated.mine("schedule", "run-now", "Tikc"), 2, "no schedule 'Tikc'; did you mean 'my_tasks:Tick'?")


def test_P46_schedules_are_listed_and_paused_while_the_configuration_is_wrong(operated, server, wait_until):
    operated.start("scheduler", "--module", "my_tasks.py").until("leading")
    wait_until(lambda: server.zscore(keys.NEXT_RUNS, "my_tasks:Tick"), "it is planned")
    (operated.directory / "tasks.yaml").write_text("common: {my_tasks:Tick: {periodic: {interval_seconds: -1}}}")
    row = listed(operated, "my_tasks:Tick")["my_tasks:Tick"]
    assert (row["state"], row["rule"]) == ("unknown", None)
    assert row["next_run"] is not None
    paused = operated("schedule", "pause", "my_tasks:Tick", "--module", "my_tasks.py")
    assert (paused.returncode, paused.stdout) == (0, "my_tasks:Tick  paused\n")
    assert "the configuration of tasks is wrong" in paused.stderr
    assert "interval_seconds: must be above 0, not -1" in paused.stderr
    assert len(paused.stderr.splitlines()) == 1
    assert listed(operated, "my_tasks:Tick")["my_tasks:Tick"]["paused_since"] is not None
    resumed = operated("schedule", "resume", "--all", "--module", "my_tasks.py")
    assert "my_tasks:Tick  resumed" in resumed.stdout
    assert operated("schedule", "run-now", "my_tasks:Tick", "--module", "my_tasks.py").returncode == 1


def test_pause_without_a_schedule_is_a_usage_error(operated, one_line):
    one_line(operated.mine("schedule", "pause"), 2, "--all")
    one_line(operated.mine("schedule", "pause", "my_tasks:Tick", "--all"), 2, "--all")


def test_schedule_without_a_server_is_reported_in_one_line(operated, one_line):
    operated.environment["DIRACX_TASKS_REDIS_URL"] = "redis://:sesame@127.0.0.1:1"
    for command in (["list"], ["run-now", "my_tasks:Tick"], ["pause", "--all"]):
        assert "sesame" not in one_line(operated.mine("schedule", *command), 1, "cannot reach")
