"""A server that is away, deaf or will not have us: one line, soon, without the password."""

from __future__ import annotations

import socket
import time

import pytest
from diracx.tasks.testing import embedded_redis
from redis import Redis

COMMANDS = [
    ["call", "my_tasks:Urgent"],
    ["submit", "my_tasks:Urgent"],
    ["worker", "--worker-size", "small"],
    ["scheduler"],
]


def _never(result) -> None:
    assert "sesame" not in result.stdout + result.stderr


@pytest.fixture
def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]  # bound and not listening: every connection is refused


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_P52_a_server_that_is_down_is_one_line_within_5_seconds(cli, one_line, closed_port, command):
    url = f"redis://user:sesame@127.0.0.1:{closed_port}"
    began = time.monotonic()
    result = cli.mine(*command, "--redis-url", url)
    assert time.monotonic() - began < 5
    one_line(result, 1, f"redis://user:***@127.0.0.1:{closed_port}", "cannot reach", "--redis-url")
    _never(result)


def test_P52_a_server_that_never_answers_is_given_up_within_5_seconds(cli, one_line):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        began = time.monotonic()
        result = cli.mine("submit", "my_tasks:Urgent", "--redis-url", f"redis://127.0.0.1:{deaf.getsockname()[1]}")
        assert time.monotonic() - began < 5
    one_line(result, 1, "no answer within 2 s")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_wrong_password_is_one_line_that_does_not_show_it(cli, one_line, command):
    with embedded_redis() as url:
        with Redis.from_url(url) as client:
            client.config_set("requirepass", "right")
        cli.environment["DIRACX_TASKS_REDIS_URL"] = url.replace("://", "://:sesame@")
        result = cli.mine(*command)
    one_line(result, 1, "password", "DIRACX_TASKS_REDIS_URL", "redis://:***@")
    _never(result)


@pytest.mark.parametrize(
    ("url", "code", "said"),
    [
        ("http://:sesame@localhost", 2, ["http://:***@localhost", "redis://"]),
        ("redis://:sesame@localhost/one", 2, ["'one'", "no number"]),
        ("redis://:ses/ame@localhost", 2, ["malformed", "redis://:***@localhost"]),
        ("redis://localhost:99999?password=sesame", 2, ["malformed", "password=***"]),
        ("localhost:6379", 2, ["'localhost:6379'", "redis://"]),
    ],
)
def test_a_url_that_cannot_be_meant_is_one_line(cli, one_line, url, code, said):
    result = cli.mine("submit", "my_tasks:Urgent", "--redis-url", url)
    one_line(result, code, "--redis-url", *said)
    _never(result)
    assert "ses/ame" not in result.stderr


def test_a_bad_url_in_the_environment_names_the_variable(cli, one_line):
    cli.environment["DIRACX_TASKS_REDIS_URL"] = "http://:sesame@localhost"
    result = cli.mine("scheduler")
    one_line(result, 1, "DIRACX_TASKS_REDIS_URL", "http://:***@localhost")


def test_a_database_number_that_the_server_does_not_have_is_one_line(cli, one_line, redis_url):
    result = cli.mine("submit", "my_tasks:Urgent", "--redis-url", f"{redis_url}/99")
    one_line(result, 1, f"{redis_url}/99", "no such database")


def test_the_option_wins_over_the_environment(cli, redis_url):
    cli.environment["DIRACX_TASKS_REDIS_URL"] = "redis://127.0.0.1:1"
    result = cli.mine("call", "my_tasks:Urgent", "--redis-url", redis_url, "--json")
    assert result.returncode == 0
    assert result.stdout == '{"urgent": [1, 2]}\n'
