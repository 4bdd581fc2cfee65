"""Transient errors of Redis are recognised by the errors of redis-py."""

from __future__ import annotations

import socket

import pytest
from diracx.tasks.plumbing._util.retrying import (
    NO_PRIMARY,
    Outage,
    is_transient,
    may_pass,
    reason,
    retry_until_available,
)
from redis._parsers import BaseParser
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, RedisError, ResponseError, TimeoutError
from redis.sentinel import MasterNotFoundError


def refusal(words: str) -> RedisError:
    """The exception that a client raises for such a reply of a server."""
    error = BaseParser.parse_error(words)
    return error if isinstance(error, RedisError) else ResponseError(words)


@pytest.mark.parametrize(
    "words",
    [
        "BUSY Valkey is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
        "CLUSTERDOWN Hash slot not served",
        "LOADING Valkey is loading the dataset in memory",
        "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
        "MISCONF Errors writing to the AOF file: No space left on device",
        "NOREPLICAS Not enough good replicas to write.",
        "OOM command not allowed when used memory > 'maxmemory'.",
        "READONLY You can't write against a read only replica.",
        "TRYAGAIN Multiple keys request during rehashing of slot",
        "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)",
    ],
    ids=lambda words: words.split()[0],
)
def test_P6_transient_errors_are_retried(words: str) -> None:
    assert is_transient(refusal(words))


@pytest.mark.parametrize(
    "error", [ConnectionError("gone"), TimeoutError("deaf"), OSError("no route"), MasterNotFoundError()]
)
def test_P6_workers_wait_for_an_unavailable_server(error: BaseException) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "words",
    [
        "WRONGPASS invalid username-password pair or user is disabled.",
        "NOAUTH Authentication required.",
        "NOPERM User x has no permissions to run the 'get' command",
        "ERR DB index is out of range",
        "ERR unknown command 'XADD'",
        "WRONGTYPE Operation against a key holding the wrong kind of value",
        "BUSYGROUP Consumer Group name already exists",
    ],
    ids=lambda words: " ".join(words.split()[:2]),
)
def test_a_permanent_error_is_not_retried(words: str) -> None:
    assert not is_transient(refusal(words))


@pytest.mark.parametrize(
    ("words", "repaired"),
    [
        ("OOM command not allowed when used memory > 'maxmemory'.", True),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", True),
        ("NOGROUP No such key 'x' or consumer group 'y' in XREADGROUP with GROUP option", True),
        ("ERR value is not an integer or out of range script: 5a, on @user_script:2.", True),
        ("ERR user_script:9: attempt to index a nil value script: 5a, on @user_script:9.", True),
        ("NOPERM User x has no permissions to run the 'get' command", False),
        ("NOAUTH Authentication required.", False),
        ("MOVED 3999 127.0.0.1:6381", False),
        ("CROSSSLOT Keys in request don't hash to the same slot", False),
        (
            "ERR Script attempted to access keys that do not hash to the same slot script: 5a, on @user_script:2.",
            False,
        ),
        ("ERR Script attempted to access a slot not served script: 5a, on @user_script:2.", False),
        ("ERR Error compiling script (new function): user_script:1: unexpected symbol near '#'", False),
        ("ERR unknown command 'XADD', with args beginning with: ", False),
        ("ERR Unknown Redis command called from script script: 5a, on @user_script:2.", False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_only_errors_that_a_repair_of_data_can_end_are_retried(words: str, repaired: bool) -> None:
    assert may_pass(refusal(words)) == repaired


async def test_a_call_is_repeated_until_it_works() -> None:
    replies = iter([ConnectionError("gone"), refusal("OOM no"), "reply"])

    async def call() -> str:
        reply = next(replies)
        if isinstance(reply, Exception):
            raise reply
        return str(reply)

    assert await retry_until_available(call, "ask") == "reply"


def test_pauses_grow_to_a_limit_and_begin_again() -> None:
    pauses = Outage("count")
    grown = [pauses.failed("none") for _ in range(20)]
    assert grown[0] <= 0.05
    assert all(1.0 <= pause <= 2.0 for pause in grown[-10:])
    pauses.over()
    assert pauses.failed("none") <= 0.05


async def test_the_error_of_sentinels_without_a_primary_contains_no_objects_of_redis_py() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and not listening: every connection is refused
        sentinel = Sentinel([closed.getsockname()], sentinel_kwargs={"retry": Retry(NoBackoff(), 0)})
        with pytest.raises(NO_PRIMARY) as raised:
            await sentinel.discover_master("tasks")
    assert reason(raised.value) == "No master found for 'tasks'; not every sentinel responds"
    assert reason(ConnectionError("gone.")) == "gone"
    assert reason(ConnectionError()) == "ConnectionError"
