"""Addresses of servers: valid ones, and errors of invalid ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from diracx.tasks.plumbing._util.passwords import mask
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.broker.address import OPTIONS
from diracx.tasks.plumbing.broker.connection import (
    AddressError,
    async_client,
    check_url,
    read_url_file,
    redis_url_from_environment,
    sync_client,
)


def options_of(client: Any) -> dict[str, Any]:
    options: dict[str, Any] = client.connection_pool.connection_kwargs
    return options


@pytest.mark.parametrize("make", [async_client, sync_client])
def test_a_sentinel_url_names_sentinels_service_database_and_credentials(make: Any) -> None:
    url = "redis+sentinel://user:p%40ss@one:1,[::1]:2,three/tasks/5?sentinel_password=s&health_check_interval=7"
    client = make(url, socket_timeout=3.0)
    pool = client.connection_pool
    sentinels = pool.sentinel_manager.sentinels
    places = [(options_of(s)["host"], options_of(s)["port"]) for s in sentinels]
    assert places == [("one", 1), ("::1", 2), ("three", 26379)]
    assert pool.service_name == "tasks"
    assert {options_of(sentinel)["password"] for sentinel in sentinels} == {"s"}
    expected = {"username": "user", "password": "p@ss", "db": 5, "socket_timeout": 3.0, "health_check_interval": 7}
    assert expected.items() <= options_of(client).items()


@pytest.mark.parametrize("make", [async_client, sync_client])
def test_a_url_of_sentinels_can_require_tls(make: Any) -> None:
    from redis.asyncio.sentinel import SentinelManagedSSLConnection as AsyncTls
    from redis.sentinel import SentinelManagedSSLConnection as Tls

    client = make("rediss+sentinel://one/tasks?ssl_cert_reqs=none")
    assert issubclass(client.connection_pool.connection_class, AsyncTls | Tls)


@pytest.mark.parametrize(
    ("url", "same"),
    [("valkey://h:7/2", "redis://h:7/2"), ("valkeys://h", "rediss://h"), ("redis://h", "redis://h")],
)
def test_valkey_is_another_name_of_redis(url: str, same: str) -> None:
    ours, theirs = sync_client(url).connection_pool, sync_client(same).connection_pool
    assert ours.connection_class is theirs.connection_class
    for option in ("host", "port", "db"):
        assert ours.connection_kwargs.get(option) == theirs.connection_kwargs.get(option)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://:sesame@h", "does not begin with"),
        ("localhost:6379", "does not begin with"),
        ("redis://:sesame@h/one", "'one' that is no number"),
        ("redis://:ses/ame@h", "malformed"),
        ("redis://h:0", "port 0"),
        ("redis://:sesame@", "no host"),
        ("unix://", "no path"),
        ("redis://h?db=x&password=sesame", "option db .Input should be a valid integer"),
        ("redis+sentinel://:sesame@one:x/tasks", "malformed"),
        ("redis+sentinel://:sesame@one:1,/tasks", "without a host"),
        ("redis+sentinel://:sesame@one:1", "no name of a service"),
        ("redis+sentinel://:sesame@one:1/tasks/two", "'two' that is no number"),
        ("redis+sentinel://one/tasks?sentinel_pasword=sesame", "unknown option 'sentinel_pasword"),
    ],
)
def test_an_invalid_address_is_refused_without_its_password(url: str, said: str) -> None:
    for use in (partial(check_url, origin="here"), sync_client, async_client, RedisStreamBroker):
        with pytest.raises(AddressError, match=said) as caught:
            use(url)
        assert "ses" not in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://h?decode_responses=true", "'decode_responses', which cannot be set"),
        ("redis://h?foo=bar", "'foo', which cannot be set"),
        *[
            (f"redis://h?{name}=1", f"'{name}', which cannot be set")
            for name in (
                "protocol",
                "encoding",
                "encoding_errors",
                "retry_on_timeout",
                "retry_on_error",
                "timeout",
            )
        ],
        *[
            (f"redis://h?{name}=1", f"'{name}', which cannot be set")
            for name in ("single_connection_client", "legacy_responses", "socket_read_size", "host", "path", "ssl")
        ],
        ("redis://h?ssl_cert_reqs=none", "no address with TLS"),
        ("rediss://h?ssl_cert_reqs=maybe", "should be 'none', 'optional' or 'required'"),
        ("rediss://h?ssl_ca_certs=/no/such/file", "cannot be read"),
        ("rediss://h?ssl_check_hostname=perhaps", "should be a valid boolean"),
        ("redis://h?max_connections=1", "max_connections .Input should be greater than or equal to 2"),
        ("redis+sentinel://h/s?max_connections=many", "max_connections .Input should be a valid integer"),
        ("redis://h?socket_timeout=0", "greater than or equal to 1"),
        ("redis://h?socket_timeout=nan", "should be a finite number"),
        ("redis://h?socket_connect_timeout=soon", "should be a valid number"),
        ("redis://h?health_check_interval=-1", "greater than or equal to 0"),
        ("redis://h?client_name=a%20b", "has a space"),
        ("redis://h?db=1&db=2", "'db' twice"),
        ("redis://h/1?db=2", "db twice"),
        ("redis://user@h?username=other", "username twice"),
        ("redis://h?db=", "without a value"),
        ("redis://h?a%0Ab=c", r"'a\\nb', which"),
        ("unix:///s?socket_keepalive=true", "socket_keepalive"),
        ("unix://relative/s", "third /"),
        ("redis://h/0#junk", "has a #"),
        ("redis://h/0 ", None),
        ("redis://h /0", "space"),
        ("redis://h/0/junk", "no number"),
        ("redis://::1:6379", "IPv6 address in"),
        ("redis://", "no host"),
    ],
)
def test_an_invalid_url_is_an_error_of_one_line_everywhere(url: str, said: str | None) -> None:
    for use in (partial(check_url, origin="here"), sync_client, async_client, RedisStreamBroker):
        if said is None:
            use(url)
            continue
        with pytest.raises(AddressError, match=said) as caught:
            use(url)
        assert "\n" not in str(caught.value)


def test_every_option_of_redis_py_is_either_accepted_or_refused() -> None:
    """A new release of redis-py may know new options: the update decides whether a URL may have them."""
    from redis.asyncio.connection import URL_QUERY_ARGUMENT_PARSERS

    refused = {"legacy_responses", "protocol", "retry_on_timeout", "socket_read_size", "timeout"}
    refused |= {"ssl_include_verify_flags", "ssl_exclude_verify_flags"}
    assert set(URL_QUERY_ARGUMENT_PARSERS) <= refused | set(OPTIONS)


@pytest.mark.parametrize("make", [async_client, sync_client])
def test_parameters_of_a_url_are_used_by_the_connection(make: Any) -> None:
    client = make("redis://us%3Aer:p%40%2Fss@[::1]/3?socket_timeout=7&client_name=me&socket_keepalive=no")
    expected = {"username": "us:er", "password": "p@/ss", "host": "::1", "db": 3, "socket_timeout": 7.0}
    expected |= {"client_name": "me", "socket_keepalive": False, "socket_connect_timeout": 5.0, "protocol": 2}
    assert expected.items() <= options_of(client).items()
    assert options_of(make("redis://h?socket_timeout=7", socket_timeout=2.0))["socket_timeout"] == 2.0


def test_a_certificate_that_is_not_checked_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    async_client("rediss://:sesame@h")
    assert caplog.text == ""
    async_client("rediss://:sesame@h?ssl_cert_reqs=none")
    assert "switches off the check of the certificate" in caplog.text
    async_client("rediss+sentinel://:sesame@h/s?ssl_check_hostname=no")
    assert "switches off the check of the name in the certificate" in caplog.text
    assert "sesame" not in caplog.text


def test_certificates_that_cannot_be_used_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("no certificate")
    for option in (
        f"ssl_ca_certs={tmp_path}/ca",
        f"ssl_certfile={tmp_path}/ca",
        "ssl_min_version=7",
        "ssl_ciphers=x",
    ):
        with pytest.raises(AddressError, match="options of TLS that cannot be used"):
            RedisStreamBroker(f"rediss://h?{option}")


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://user:sesame@one:1,two:2/tasks/1",
        "redis+sentinel://:sesame@one:1,two:2/tasks",
        "redis+sentinel://one/tasks?sentinel_password=sesame&password=sesame",
        "rediss://h?password=sesame",
    ],
)
def test_passwords_are_masked_in_every_kind_of_url(url: str) -> None:
    assert "sesame" not in mask(f"cannot reach {url}")
    assert "***" in mask(url)


def test_the_environment_names_a_url_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "url"
    file.write_text("redis://:sesame@h/3\n")
    monkeypatch.delenv("DIRACX_TASKS_REDIS_URL", raising=False)
    monkeypatch.delenv("DIRACX_TASKS_REDIS_URL_FILE", raising=False)
    assert redis_url_from_environment() is None
    monkeypatch.setenv("DIRACX_TASKS_REDIS_URL_FILE", str(file))
    assert redis_url_from_environment() == "redis://:sesame@h/3"
    monkeypatch.setenv("DIRACX_TASKS_REDIS_URL", "redis://other")
    assert redis_url_from_environment() == "redis://other"


def test_a_file_that_cannot_be_read_or_is_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(AddressError, match="No such file"):
        read_url_file(str(tmp_path / "missing"), "--redis-url-file")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(AddressError, match="is empty"):
        read_url_file(str(tmp_path / "empty"), "--redis-url-file")
