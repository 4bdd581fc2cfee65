"""Limits of the audit log per user."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from diracx.core.properties import NORMAL_USER, SERVICE_ADMINISTRATOR
from diracx.routers.utils.users import AuthorizedUserInfo
from diracx.tasks.operations import audit
from diracx.tasks.operations.audit import AuditLog, read_audit
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.web.api import environment
from diracx.tasks.web.api.audit_logger import AuditLogger, UserActionRate
from diracx.tasks.web.api.responses import BROKER_AWAY
from fastapi import HTTPException
from redis.asyncio import Redis


def user(name: str, vo: str, *properties: str) -> AuthorizedUserInfo:
    """A user as DiracX makes one of a token."""
    return AuthorizedUserInfo.model_validate(
        {
            "sub": f"{vo}:{name}",
            "preferred_username": name,
            "vo": vo,
            "dirac_group": "group",
            "properties": list(properties),
            "bearer_token": "",
            "token_id": "0" * 32,
        }
    )


async def refused() -> str:
    raise ValueError("there is no such compute element")


async def done() -> str:
    return "done"


@pytest.fixture
def perform(redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Awaitable[Any]]:
    """Acts as a user, in an application that knows this server."""

    class AppContext:
        pass

    async def this() -> Any:
        made = AppContext()
        made.redis = redis  # type: ignore[attr-defined]
        return made

    monkeypatch.setenv("DIRACX_TASKS_REDIS_URL", redis_url)
    monkeypatch.setattr(environment, "open_context", this)

    async def act(who: AuthorizedUserInfo, target: str, do: Callable[[], Awaitable[str]] = done) -> Any:
        return await AuditLogger(who).perform("submit pilot", target, do)

    return act


async def test_a_user_cannot_push_an_action_of_an_administrator_or_of_another_vo_out_of_the_log(
    perform: Callable[..., Awaitable[Any]], redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "KEPT_ENTRIES", 20)
    monkeypatch.setattr(UserActionRate, "limit", 1000)
    await perform(user("root", "lhcb", SERVICE_ADMINISTRATOR), "ban of ce01")
    await perform(user("grace", "gridpp", NORMAL_USER), "ce02")
    mallory = user("mallory", "lhcb", NORMAL_USER)
    for number in range(200):  # streams are trimmed by the hundred
        with pytest.raises(ValueError, match="no such compute element"):
            await perform(mallory, f"no-ce-{number}", refused)
    assert [entry.target for entry in await read_audit(redis)] == ["ban of ce01"]
    assert [entry.target for entry in await read_audit(redis, vo="gridpp")] == ["ce02"]
    entries = await read_audit(redis, vo="lhcb")
    assert {entry.who for entry in entries} == {"mallory (lhcb:mallory)"}
    assert entries[0].target == "no-ce-199"
    assert 10 <= len(entries) < 200


async def test_the_rate_of_audited_actions_is_limited_per_user(
    perform: Callable[..., Awaitable[Any]], redis: Redis
) -> None:
    mallory, victim = user("mallory", "lhcb", NORMAL_USER), user("victor", "lhcb", NORMAL_USER)
    limit = UserActionRate.limit
    assert limit is not None
    for _ in range(limit):
        await perform(mallory, "ce")
    for _ in range(3):
        with pytest.raises(HTTPException) as problem:
            await perform(mallory, "ce")
        assert problem.value.status_code == 429
        assert problem.value.headers == {"Retry-After": "60"}
    assert len(await read_audit(redis, 1000, vo="lhcb")) == limit
    assert await perform(victim, "ce") == "done"
    [key] = [key async for key in redis.scan_iter("limiter:rate:api_user:*mallory")]
    assert 0 < await redis.pttl(key) <= 120_000  # two windows
    admin = user("root", "lhcb", SERVICE_ADMINISTRATOR)
    for _ in range(limit + 1):
        assert await perform(admin, "ce") == "done"


@pytest.mark.parametrize("fails", ["action", "log"])
async def test_an_action_that_fails_at_redis_is_not_reported_as_one_that_was_not_written(
    perform: Callable[..., Awaitable[Any]], redis: Redis, fails: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def act() -> str:
        return str(await redis.lpush("a-string", 1))

    broken = f"{keys.AUDIT_PREFIX}lhcb" if fails == "log" else "a-string"
    await redis.set(broken, "x")
    with pytest.raises(HTTPException) as problem:
        await perform(user("wilma", "lhcb", NORMAL_USER), "ce", act)
    await redis.delete(broken)
    assert problem.value.status_code == 503
    expected = "the audit log cannot be written" if fails == "log" else "the action failed"
    assert problem.value.detail == f"{expected}: {BROKER_AWAY}"
    assert "WRONGTYPE" in caplog.text
    assert [entry.ok for entry in await read_audit(redis, vo="lhcb")] == ([] if fails == "log" else [False])


@pytest.mark.parametrize("data", ["7", "[]", "null", "{", "[" * 3000, '{"who": "\\ud800"}'])
async def test_an_entry_of_another_version_hides_no_other(redis: Redis, data: str) -> None:
    async def act() -> str:
        return "done"

    await AuditLog(redis, "wilma", "api", "lhcb").perform("submit pilot", "ce", act)
    await redis.xadd(f"{keys.AUDIT_PREFIX}lhcb", {"data": data})
    assert "wilma" in [entry.who for entry in await read_audit(redis, vo="lhcb")]


async def test_an_audit_entry_is_bounded_for_any_request(redis: Redis) -> None:
    async def long() -> str:
        return "o" * 100_000

    await AuditLog(redis, "w" * 100_000, "api", "lhcb").perform("submit pilot", "t" * 40_000, long)
    sizes = [len(fields[b"data"]) for _, fields in await redis.xrange(f"{keys.AUDIT_PREFIX}lhcb")]
    assert len(sizes) == 2
    assert max(sizes) < 1_000
    [entry] = await read_audit(redis, vo="lhcb")
    assert entry.ok
    assert entry.target.endswith("(the first 300 of 40000 characters)")
