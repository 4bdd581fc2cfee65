"""Addresses of servers: what they mean, and what is said of those that mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.broker.connection import (
    AddressError,
    async_client,
    check_url,
    read_url_file,
    redis_url_from_environment,
    sync_client,
)
from diracx.tasks.plumbing.secrets import mask


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
def test_tls_with_sentinels(make: Any) -> None:
    from redis.asyncio.sentinel import SentinelManagedSSLConnection as AsyncTls
    from redis.sentinel import SentinelManagedSSLConnection as Tls

    client = make("rediss+sentinel://one/tasks?ssl_cert_reqs=none")
    assert client.connection_pool.connection_class in (AsyncTls, Tls)


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
        ("sesame", "does not begin with"),
        ("redis://:sesame@h/one", "'one' that is no number"),
        ("redis://:ses/ame@h", "malformed"),
        ("redis://h:0", "port 0"),
        ("redis://:sesame@", "no host"),
        ("unix://", "no path"),
        ("redis://h?db=x&password=sesame", "parameter"),
        ("redis+sentinel://:sesame@one:x/tasks", "malformed"),
        ("redis+sentinel://:sesame@one:1,/tasks", "without a host"),
        ("redis+sentinel://:sesame@one:1", "no name of a service"),
        ("redis+sentinel://:sesame@one:1/tasks/two", "'two' that is no number"),
        ("redis+sentinel://one/tasks?sentinel_pasword=sesame", "unknown option sentinel_pasword"),
    ],
)
def test_what_is_no_address_is_refused_without_showing_a_password(url: str, said: str) -> None:
    for use in (check_url, sync_client, async_client, RedisStreamBroker):
        with pytest.raises(AddressError, match=said) as caught:
            use(url)
        assert "ses" not in str(caught.value)


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
        read_url_file(str(tmp_path / "missing"))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(AddressError, match="is empty"):
        read_url_file(str(tmp_path / "empty"))
