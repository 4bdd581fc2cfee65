"""The command `submit`: validation before submission, and `--wait` for the outcome."""

from __future__ import annotations

import json
import re
import sys

import pytest
from redis import Redis


@pytest.fixture
def server(redis_url):
    with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client
        client.flushall()


def test_submit_prints_the_id(served, server):
    result = served.mine("submit", "my_tasks:Greet", "--args", '["x"]')
    assert result.returncode == 0
    assert result.stderr == ""
    assert re.fullmatch(r"Submitted task 'my_tasks:Greet' with ID: [0-9a-f]{32}\n", result.stdout)
    assert server.xlen("diracx:tasks:normal:medium") == 1


def test_P1_submit_routes_by_the_class(served, server):
    result = served.mine("submit", "my_tasks:Urgent", "--json")
    assert json.loads(result.stdout)["state"] == "submitted"
    assert server.xlen("diracx:tasks:realtime:small") == 1
    assert server.dbsize() == 1


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_submit_that_cannot_write_its_output_says_what_it_has_done(served, server, one_line, options):
    program = ("sh", "-c", 'exec "$0" -m diracx.tasks "$@" > /dev/full', sys.executable)
    result = served("submit", "my_tasks:Urgent", "--module", "my_tasks.py", *options, program=program)
    line = one_line(result, 1, "cannot write the output: No space left on device; it is: ", "my_tasks:Urgent")
    assert re.search("[0-9a-f]{32}", line)
    assert server.xlen("diracx:tasks:realtime:small") == 1
    one_line(served("--help", program=program), 1, "No space left on device")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["my_tasks:Greet"], ["missing argument", "'name'"]),
        (["my_tasks:Greet", "--args", '["x", "y"]'], ["'times'", "integer", "'y'"]),
        (["my_tasks:Greet", "--args", "[1, 2, 3]"], ["3 positional arguments", "takes 2"]),
        (["my_tasks:Greet", "--kwargs", '{"nam": "x"}'], ["'nam'", "did you mean 'name'"]),
        (["my_tasks:Greet", "--args", '["x"'], ["--args", '["x"', "not valid JSON", "JSON list"]),
        (["my_tasks:Greet", "--args", '{"name": "x"}'], ["--args", "JSON list"]),
        (["my_tasks:Greet", "--kwargs", "[]"], ["--kwargs", "JSON object"]),
        (["my_tasks:Urgent", "--at", "tomorrow"], ["--at", "'tomorrow'", "2030-01-31T12:00:00+01:00"]),
        (["my_tasks:Urgent", "--timeout", "3"], ["--timeout", "--wait"]),
        (["my_tasks:Urgent", "--prio", "3"], ["--prio", "submit --help"]),
    ],
)
def test_P52_wrong_arguments_are_refused_in_one_line_and_nothing_is_sent(served, server, one_line, args, said):
    result = served.mine("submit", *args)
    one_line(result, 2, *said)
    assert result.stdout == ""
    assert server.dbsize() == 0


@pytest.mark.parametrize("command", ["call", "submit"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_tasks:Gret", "did you mean 'my_tasks:Greet'?"),
        ("Gret", "did you mean 'my_tasks:Greet'?"),
        ("nothing:LikeIt", "--module"),
        ("my_tasks:Greet\n", "did you mean 'my_tasks:Greet'?"),
    ],
)
def test_an_unknown_task_lists_those_there_are_and_ends_with_1(served, server, command, name, said):
    result = served.mine(command, name)
    *known, error = result.stderr.splitlines()
    assert (result.returncode, result.stdout) == (1, "")
    assert error.startswith("error: unknown task ")
    assert said in error
    assert known[0] == "known tasks:"
    assert {"  my_tasks:Greet", "  my_tasks:Urgent", "  jobs:DummyJobExecutorTask"} < set(known)
    assert known[1:] == sorted(known[1:])
    assert server.dbsize() == 0


def test_submit_at_a_later_time_waits_there(served, server):
    result = served.mine("submit", "my_tasks:Urgent", "--at", "2130-01-31T12:00:00+01:00")
    assert result.returncode == 0
    assert server.zrange("diracx:tasks:delayed", 0, -1, withscores=True) == [
        (result.stdout.split()[-1], 5051761200000.0)
    ]


def test_waiting_for_a_task_prints_its_value_or_its_error(served, server, one_line):
    served.start("worker", "--module", "my_tasks.py").until("ready")
    greeted = served.mine("submit", "my_tasks:Greet", "--args", '["x", 2]', "--wait", "--timeout", "20")
    assert greeted.returncode == 0
    assert greeted.stdout.splitlines()[1:] == ["Result: Hello x Hello x"]
    assert 0 < server.ttl(f"diracx:results:{greeted.stdout.split()[5]}") <= 3600

    failed = served.mine("submit", "my_tasks:Fail", "--wait", "--timeout", "20", "--json")
    line = one_line(failed, 1, "my_tasks:Fail", "ValueError: broken by redis://u:***@host/1")
    report = json.loads(failed.stdout)
    assert report["state"] == "failed"
    assert report["error"]["type"] == "ValueError"
    assert report["task_id"] in line


def test_submit_reports_that_the_task_continues_after_the_wait_has_timed_out(served, server, one_line):
    result = served.mine("submit", "my_tasks:Urgent", "--wait", "--timeout", "0.1", "--json")
    report = json.loads(result.stdout)
    assert report["state"] == "submitted"
    one_line(result, 1, report["task_id"], "0.1 s", "continues", "small")
    assert server.xlen("diracx:tasks:realtime:small") == 1
