"""Commands without a usable server: errors of one line, soon, without the password."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer
from diracx.tasks.cli import application
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


def promptly(run: Callable[[], Any]) -> Any:
    """Its result, within 5 s: once in three times, for the machine may be busy with something else."""
    for _ in range(3):
        began = time.monotonic()
        result = run()
        if time.monotonic() - began < 5:
            return result
    raise AssertionError(f"not within 5 s: {result}")


@pytest.fixture
def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]  # bound and not listening: every connection is refused


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_P52_a_server_that_is_down_is_reported_in_one_line_within_5_seconds(cli, one_line, closed_port, command):
    url = f"redis://user:sesame@127.0.0.1:{closed_port}"
    result = promptly(lambda: cli.mine(*command, "--redis-url", url))
    one_line(result, 1, f"redis://user:***@127.0.0.1:{closed_port}", "cannot reach", "--redis-url")
    _never(result)


def test_P52_a_server_that_never_replies_is_abandoned_within_5_seconds(cli, one_line):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        result = promptly(
            lambda: cli.mine(
                "submit", "my_tasks:Urgent", "--redis-url", f"redis://127.0.0.1:{deaf.getsockname()[1]}"
            )
        )
    one_line(result, 1, "no reply within 2 s")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_wrong_password_is_reported_in_one_line_within_5_seconds_that_does_not_show_it(cli, one_line, command):
    with embedded_redis() as url:
        with Redis.from_url(url) as client:
            client.config_set("requirepass", "right")
        cli.environment["DIRACX_TASKS_REDIS_URL"] = url.replace("://", "://:sesame@")
        result = promptly(lambda: cli.mine(*command))
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
        (
            "redis+sentinel://:sesame@one:26379",
            2,
            ["redis+sentinel://:***@one:26379", "no name of a service", "write redis+sentinel://host"],
        ),
        ("redis://localhost?decode_responses=true", 2, ["'decode_responses', which cannot be set"]),
        ("redis://localhost?foo=bar", 2, ["'foo', which cannot be set"]),
        ("redis://localhost?max_connections=1", 2, ["max_connections", "greater than or equal to 2"]),
        ("rediss://localhost?ssl_ca_certs=/no/such/file", 2, ["ssl_ca_certs", "cannot be read"]),
        ("unix://relative/socket", 2, ["unix:///path/of/socket"]),
        ("redis+sentinel://one/tasks/two?sentinel_password=sesame", 2, ["'two'", "sentinel_password=***"]),
    ],
)
def test_an_invalid_url_is_reported_in_one_line(cli, one_line, url, code, said):
    result = cli.mine("submit", "my_tasks:Urgent", "--redis-url", url)
    one_line(result, code, "--redis-url", *said)
    _never(result)
    assert "ses/ame" not in result.stderr


def test_a_bad_url_in_the_environment_names_the_variable(cli, one_line):
    cli.environment["DIRACX_TASKS_REDIS_URL"] = "http://:sesame@localhost"
    result = cli.mine("scheduler")
    one_line(result, 1, "DIRACX_TASKS_REDIS_URL", "http://:***@localhost")


def test_a_database_number_that_the_server_does_not_have_is_reported_in_one_line(cli, one_line, redis_url):
    result = cli.mine("submit", "my_tasks:Urgent", "--redis-url", f"{redis_url}/99")
    one_line(result, 1, f"{redis_url}/99", "no such database")


def test_the_option_wins_over_the_environment(cli, redis_url):
    cli.environment["DIRACX_TASKS_REDIS_URL"] = "redis://127.0.0.1:1"
    result = cli.mine("call", "my_tasks:Urgent", "--redis-url", redis_url, "--json")
    assert result.returncode == 0
    assert result.stdout == '{"urgent": [1, 2]}\n'


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("{}/99", "no such database"),
        ("{}/one", "'one' that is no number"),
        ("http://:sesame@localhost", "redis://"),
    ],
)
def test_a_bad_url_ends_every_command_within_5_seconds(cli, one_line, redis_url, command, url, said):
    cli.environment["DIRACX_TASKS_REDIS_URL"] = url.format(redis_url)
    result = promptly(lambda: cli.mine(*command))
    one_line(result, 1, said)
    _never(result)


def test_unavailable_sentinels_and_unknown_services_are_errors_of_one_line(cli, one_line, closed_port, redis_url):
    result = promptly(
        lambda: cli.mine("worker", "--redis-url", f"redis+sentinel://:sesame@127.0.0.1:{closed_port}/tasks")
    )
    message = one_line(result, 1, "cannot reach", f"redis+sentinel://:***@127.0.0.1:{closed_port}/tasks")
    assert "No master found for 'tasks'; not every sentinel responds; check" in message
    assert "redis.asyncio" not in message
    _never(result)


@pytest.mark.parametrize("way", ["option", "environment"])
def test_a_url_with_a_password_is_read_from_a_file_and_never_printed(cli, tmp_path, way):
    with embedded_redis() as url:
        with Redis.from_url(url) as client:
            client.config_set("requirepass", "sesame")
        file = tmp_path / "broker-url"
        file.write_text(url.replace("://", "://:sesame@") + "\n")
        file.chmod(0o600)
        options = ["--redis-url-file", str(file)] if way == "option" else []
        if way == "environment":
            cli.environment["DIRACX_TASKS_REDIS_URL_FILE"] = str(file)
        worker = cli.start("worker", "--worker-size", "small", "--module", "my_tasks.py", *options)
        worker.until("ready: small tasks")
        shown = Path(f"/proc/{worker.process.pid}/cmdline").read_text()
        result = cli.mine("submit", "my_tasks:Urgent", "--wait", "--json", *options)
        assert result.returncode == 0, result.stderr
        worker.process.terminate()
        assert worker.ends() == 0
        assert "redis://:***@" in worker.output
        _never(result)
        assert "sesame" not in worker.output + shown


def test_every_command_that_takes_a_url_takes_it_from_a_file(cli, initialised_task_db, tmp_path):
    commands = list(_commands(typer.main.get_command(application())))
    with_url = {path for path, names in commands if "redis_url" in names}
    assert with_url == {path for path, names in commands if "redis_url_file" in names}
    assert {"call", "cancel", "dlq retry", "group list", "group show"} < with_url

    cli.environment["DIRACX_DB_URL_TASKDB"] = initialised_task_db
    with embedded_redis() as url:
        with Redis.from_url(url) as client:
            client.config_set("requirepass", "sesame")
        file = tmp_path / "broker-url"
        file.write_text(url.replace("://", "://:sesame@"))
        for command, message in (
            (("group", "list"), "no callback groups"),
            (("group", "show", "x"), "no group 'x'"),
            (("cancel", "x"), "nothing to cancel"),
            (("dlq", "retry", "--all", "--yes"), "no dead letters"),
        ):
            result = cli(*command, "--redis-url-file", str(file))
            assert message in result.stderr
            _never(result)


def _commands(command: Any, path: str = "") -> Iterator[tuple[str, set[str]]]:
    for name, each in getattr(command, "commands", {}).items():
        yield from _commands(each, f"{path} {name}".strip())
    if not hasattr(command, "commands"):
        yield path, {parameter.name for parameter in command.params}


@pytest.mark.parametrize(
    ("options", "variable", "text", "code", "said"),
    [
        (["--redis-url-file", "missing"], None, None, 2, ["--redis-url-file", "missing", "No such file"]),
        (["--redis-url-file", "given"], None, "", 2, ["--redis-url-file", "is empty"]),
        (["--redis-url-file", "given"], None, "http://:sesame@h", 2, ["--redis-url-file", "http://:***@h"]),
        ([], "missing", None, 1, ["DIRACX_TASKS_REDIS_URL_FILE", "No such file"]),
        ([], "given", "redis://:sesame@h/one", 1, ["DIRACX_TASKS_REDIS_URL_FILE", "no number"]),
        (["--redis-url", "redis://h", "--redis-url-file", "given"], None, "redis://h", 2, ["one of them"]),
    ],
)
def test_a_url_file_that_cannot_be_used_is_reported_in_one_line(
    cli, one_line, tmp_path, options, variable, text, code, said
):
    if text is not None:
        (tmp_path / "given").write_text(text)
    if variable is not None:
        cli.environment["DIRACX_TASKS_REDIS_URL_FILE"] = variable
    result = cli.mine("submit", "my_tasks:Urgent", *options)
    one_line(result, code, *said)
    _never(result)


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_deletes_tasks_when_its_memory_is_full_causes_a_warning(cli, policy):
    """1,000 waiting tasks were lost silently."""
    message = f"maxmemory-policy {policy}: it deletes tasks and locks when its memory is full"
    with embedded_redis("--maxmemory", "50mb", "--maxmemory-policy", policy) as url:
        cli.environment["DIRACX_TASKS_REDIS_URL"] = url
        for command in (["worker"], ["scheduler"], ["dashboard", "--port", "0"]):
            cli.start(*command).until(message)
        status = " ".join(cli("status").stdout.split())
        assert message in status
        assert status.count("maxmemory-policy noeviction") == 1, "the way out is said once"
        cli.stop()
        with Redis.from_url(url) as client:
            client.execute_command("ACL", "SETUSER", "default", "-info", "-config")
        assert cli("status").returncode == 0, "a server that does not tell is not complained of"
        assert "maxmemory-policy" not in cli("status").stdout


def test_a_server_that_keeps_its_data_causes_no_warning(cli):
    with embedded_redis("--maxmemory", "50mb", "--maxmemory-policy", "noeviction") as url:
        cli.environment["DIRACX_TASKS_REDIS_URL"] = url
        worker = cli.start("worker")
        worker.until("ready: ")
        assert "maxmemory" not in worker.output + cli("status").stdout
        cli.stop()


@pytest.fixture
def tls_port(tmp_path):
    """A server that is not Redis; its certificate is checked first."""
    request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    files = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "certificate")]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*request, *files, *names], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with suppress(OSError):
                        context.wrap_socket(connection, server_side=True).close()
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(("host", "option"), [("localhost", ""), ("127.0.0.1", "?ssl_ca_certs={}/certificate")])
def test_a_certificate_that_is_not_trusted_is_reported_in_one_line_with_the_way_out(
    cli, one_line, tls_port, tmp_path, host, option
):
    url = f"rediss://:sesame@{host}:{tls_port}{option.format(tmp_path)}"
    for command in COMMANDS:
        result = cli.mine(*command, "--redis-url", url)
        one_line(
            result,
            1,
            "cannot reach",
            "CERTIFICATE_VERIFY_FAILED",
            "ssl_ca_certs=FILE",
            f"rediss://:***@{host}:{tls_port}",
        )
        _never(result)
