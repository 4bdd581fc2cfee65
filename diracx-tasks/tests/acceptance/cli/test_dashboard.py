"""The command `dashboard`: access control and refused starts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import httpx
import pytest
from diracx.tasks.testing import embedded_redis
from redis import Redis as SyncRedis
from support.command_line import Cli
from support.waiting import eventually

TOKEN_VARIABLE = "DIRACX_TASKS_DASHBOARD_TOKEN"
TOKEN = "a-token-that-is-long-enough"

Serving = Callable[..., AbstractContextManager[str]]


@pytest.fixture
def serving(cli: Cli) -> Serving:
    """`with serving("--redis-url", url) as line:` runs a dashboard and yields the line with its address."""

    address = re.compile(r"^(http://.*)\n", re.MULTILINE)

    @contextmanager
    def serve(*arguments: str, said: list[str] | None = None) -> Iterator[str]:
        dashboard = cli.start("dashboard", "--port", "0", *arguments)
        eventually(lambda: address.search(dashboard.output), "the address")
        yield address.findall(dashboard.output)[0]
        dashboard.process.terminate()
        assert dashboard.ends() == 0, dashboard.output
        assert "Traceback" not in dashboard.output
        if said is not None:
            said += dashboard.output.splitlines()

    return serve


def root_of(address: str) -> httpx.URL:
    return httpx.URL(address).join("/")


def test_only_the_printed_address_signs_in(serving: Serving, redis_url: str) -> None:
    with serving("--redis-url", redis_url) as address:
        found = re.fullmatch(r"(http://127\.0\.0\.1:\d+)/sign-in\?token=([\w-]{40,})", address)
        assert found
        with httpx.Client(base_url=found[1]) as client:
            assert client.get("/").headers["location"].startswith("/sign-in")
            assert client.get("/sign-in?token=guessed").status_code == 403
            assert client.get("/", headers={"host": "evil.example"}).status_code == 421
            assert client.get(address).status_code == 303
            page = client.get("/", follow_redirects=True)
            assert page.status_code == 200
            assert "read and write" in page.text


def test_read_only_shows_no_button_that_acts(serving: Serving, redis_url: str) -> None:
    with serving("--redis-url", redis_url, "--read-only") as address, httpx.Client() as client:
        page = client.get(address, follow_redirects=True)
        assert "read-only" in page.text
        assert "read and write" not in page.text


def test_live_pages_do_not_delay_the_shutdown(serving: Serving, redis_url: str) -> None:
    with serving("--redis-url", redis_url) as address, httpx.Client() as client:
        client.get(address)
        with client.stream("GET", httpx.URL(address).join("/live/queues")) as following:
            assert "retry" in next(following.iter_text())


def test_a_public_name_is_matched_without_regard_to_case_and_port(serving: Serving, redis_url: str) -> None:
    with serving("--redis-url", redis_url, "--public-name", "Tasks.Example.org") as address:
        for name in ("tasks.example.org", "Tasks.Example.org:8443", "127.0.0.1"):
            assert httpx.get(address, headers={"host": name}).status_code == 303, name
        assert httpx.get(address, headers={"host": "example.org"}).status_code == 421


def test_behind_a_tls_proxy_cookies_are_secure(serving: Serving, redis_url: str) -> None:
    with serving("--redis-url", redis_url, "--public-name", "tasks.example.org") as address:
        for name, secure in (("tasks.example.org", True), ("127.0.0.1", False), ("localhost", False)):
            cookie = httpx.get(address, headers={"host": name}).headers["set-cookie"]
            assert ("; Secure" in cookie) is secure, name


def test_the_printed_address_is_good_on_any_address_of_loopback(serving: Serving, redis_url: str) -> None:
    with serving("--redis-url", redis_url, "--host", "127.0.0.2") as address:
        assert address.startswith("http://127.0.0.2:")
        assert httpx.get(address).status_code == 303


def test_probes_need_no_token_and_accept_any_host_name(serving: Serving, redis_url: str) -> None:
    with serving("--redis-url", redis_url) as address, httpx.Client(base_url=root_of(address)) as client:
        for path in ("/healthz", "/readyz"):
            response = client.get(path, headers={"host": "10.1.2.3:8790"})
            assert (response.status_code, response.text) == (200, "ok\n")
            assert client.post(path).status_code == 405
            assert client.head(path).status_code == 200
        assert client.get("/healthz/").status_code == 303


def test_without_redis_the_dashboard_is_alive_and_not_ready(serving: Serving) -> None:
    with embedded_redis() as url, ExitStack() as stack:
        address = stack.enter_context(serving("--redis-url", url))
        client = stack.enter_context(httpx.Client(base_url=root_of(address)))
        assert client.get("/readyz").status_code == 200
        with SyncRedis.from_url(url) as server:
            server.execute_command("CLIENT", "PAUSE", 600_000, "ALL")
        eventually(lambda: client.get("/readyz").status_code != 200)  # until then, as of the last second
        response = client.get("/readyz")
        assert (response.status_code, response.text) == (503, "not ready\ncritical server_away\n")
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(("host", "warns"), [("127.1", True), ("127.0.0.1", False)])
def test_plain_http_off_loopback_is_warned_about_in_one_line(
    cli: Cli, serving: Serving, redis_url: str, host: str, warns: bool
) -> None:
    cli.environment[TOKEN_VARIABLE] = TOKEN
    # 127.1 is loopback, too; only to those who do not look closely is it a name like any other.
    arguments = ("--host", host, "--public-name", "tasks.example.org")
    printed: list[str] = []
    with serving("--redis-url", redis_url, *arguments, said=printed) as address:
        assert (TOKEN in address) is not warns
        client = httpx.Client(base_url=f"http://127.0.0.1:{httpx.URL(address).port}")
        with client:
            assert client.get("/healthz").status_code == 200
            sign_in = {"url": "/sign-in", "headers": {"host": "tasks.example.org"}}
            assert client.post(**sign_in, data={"credential": "guessed"}).status_code == 403
            assert client.post(**sign_in, data={"credential": TOKEN}).status_code == 303
    warned = [line for line in printed if "plain HTTP" in line]
    assert len(warned) == warns
    assert all(line.startswith("warning: 127.1 ") for line in warned)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--host", "0.0.0.0"], 2, TOKEN_VARIABLE),
        (["--host", "192.0.2.1"], 2, TOKEN_VARIABLE),
        (["--host", "::"], 2, TOKEN_VARIABLE),
        (["--public-name", "tasks.example.org:8443"], 2, "without scheme, port and path"),
        (["--public-name", "https://tasks.example.org"], 2, "without scheme, port and path"),
        (["--tls-key", "key.pem"], 2, "need each other"),
        (["--host", "no such host"], 2, TOKEN_VARIABLE),
        (["--redis-url", "redis://127.0.0.1:1"], 1, "cannot reach Redis"),
    ],
)
def test_impossible_arguments_are_refused_with_one_line(
    cli: Cli, arguments: list[str], code: int, says: str
) -> None:
    _is_refused_with_one_line(cli, arguments, code, says)


def test_off_loopback_it_needs_a_public_name(cli: Cli) -> None:
    cli.environment[TOKEN_VARIABLE] = TOKEN
    _is_refused_with_one_line(cli, ["--host", "0.0.0.0"], 2, "--public-name")


def _is_refused_with_one_line(cli: Cli, arguments: list[str], code: int, says: str) -> None:
    found = cli("dashboard", *arguments)
    assert found.returncode == code, found.stderr
    lines = found.stderr.strip().splitlines()
    assert len(lines) == 1
    assert says in lines[0]
