"""Schedules in Redis: their plan, their occurrences, and the lead of one scheduler."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from . import keys
from .locking import acquire, extend, release
from .scripts import pack, script
from .sizes import in_calls
from .stored import SCANNED, ms_of, text_of

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from .models import LockSpec

#: Says that nobody leads any more.
LEADER_CHANNEL = keys.LEADER
#: Says that something earlier is due now, or is paused no more.
WAKE_CHANNEL = keys.WAKE_SCHEDULER
_PROBLEMS_BATCH = 250
#: How often to look whether a scheduler of version 0.7 leads no more.
_LOOK_MS = 400

#: Schedules that one script call pauses.
PAUSE_BATCH = 500


async def plan(redis: Redis, token: str, schedules: Sequence[Mapping[str, Any]]) -> bool:
    """Bring schedules up to date, see lua/plan.lua. False when somebody else leads."""
    return bool(await script("plan")(redis, args=[token, pack(schedules)]) == 1)


async def occur(redis: Redis, token: str, occurrences: Sequence[Mapping[str, Any]]) -> list[int] | None:
    """Submit occurrences of schedules.

    Returns:
        What became of each, see lua/occur.lua; None when somebody else leads.
    """
    replies: list[int] = await script("occur")(redis, args=[token, pack(occurrences)])
    return None if replies == [-1] else replies


async def run_now(redis: Redis, schedule: str, stream: str, task_id: str, data: bytes) -> str | None:
    """Submit a schedule's task at once. Returns the id of the earlier one that still waits, if there is one."""
    waiting: bytes = await script("run_now")(redis, args=[schedule, stream, task_id, data])
    return waiting.decode() or None


async def pause(redis: Redis, schedules: Sequence[str], paused: bool) -> list[bool]:
    """Pause schedules, or let them go on. Returns for which that is news."""
    news: list[bool] = []
    for part in in_calls(schedules, PAUSE_BATCH, lambda _: 0):
        news += [reply == 1 for reply in await script("pause")(redis, args=[int(paused), pack(part)])]
    return news


# --- the lead -----------------------------------------------------------------------------------------------


def _lead(token: str, lease_ms: int) -> list[LockSpec]:
    """Ours, and that of version 0.7: one scheduler leads, of whichever."""
    locks = (keys.LEADER, keys.PUBLISHED_LEADER)
    return [{"kind": "mutex", "key": key, "owner": token, "ttl_ms": lease_ms} for key in locks]


async def take_lead(redis: Redis, token: str, lease_ms: int) -> bool:
    """Take the lead if it is free, or held with this token. True when it was granted."""
    lead = _lead(token, lease_ms)
    return bool(await acquire(redis, lead)) or all(await extend(redis, lead))


async def renew_lead(redis: Redis, token: str, lease_ms: int) -> bool:
    """Renew the lead. False when it is lost."""
    return all(await extend(redis, _lead(token, lease_ms)))


async def release_lead(redis: Redis, token: str, lease_ms: int) -> None:
    """Give the lead back, and tell those who stand by. Nothing happens when it is not held with this token."""
    if await release(redis, _lead(token, lease_ms)):
        await redis.execute_command("PUBLISH", keys.LEADER, "free")


async def lead_left_ms(redis: Redis) -> int:
    """For how long one leads, if the lease is not renewed; below zero when nobody does."""
    left_ms: int = await redis.execute_command("PTTL", keys.LEADER)
    if left_ms < 0:  # 0.7 says nothing when it leads no more
        left_ms = min(_LOOK_MS, await redis.execute_command("PTTL", keys.PUBLISHED_LEADER))
    return left_ms


async def has_leader(redis: Redis) -> bool:
    """Whether a scheduler leads."""
    return bool(await redis.execute_command("EXISTS", keys.LEADER))


# --- what is stored -----------------------------------------------------------------------------------------


async def _fields(redis: Redis, key: str) -> AsyncIterator[tuple[bytes, bytes]]:
    async for name, value in redis.hscan_iter(key, count=SCANNED):
        yield name, value


async def paused_schedules(redis: Redis) -> list[str]:
    """Ids of the schedules that are paused."""
    return [text_of(name) for name in await redis.execute_command("HKEYS", keys.PAUSED)]


async def fingerprints(redis: Redis) -> dict[bytes, bytes]:
    """Schedule -> fingerprint of the rule its next run was computed from."""
    return {name: value async for name, value in _fields(redis, keys.FINGERPRINTS)}


async def next_runs(redis: Redis) -> dict[str, int]:
    """When each schedule is due (ms)."""
    found = redis.zscan_iter(keys.NEXT_RUNS, count=SCANNED)
    return {text_of(schedule): ms_of(str(due)) async for schedule, due in found}


async def next_run(redis: Redis, schedule: str) -> int | None:
    """When a schedule is due (ms); None when it has no next run."""
    stored = await redis.execute_command("ZSCORE", keys.NEXT_RUNS, schedule)
    return None if stored is None else ms_of(stored)


async def stored_schedules(redis: Redis) -> set[bytes]:
    """Ids of all schedules of which anything is stored, but for pauses."""
    stored: set[bytes] = {name async for name, _ in redis.zscan_iter(keys.NEXT_RUNS, count=SCANNED)}
    for key in (keys.FINGERPRINTS, keys.LAST_RUNS, keys.OUTCOMES, keys.PROBLEMS):
        stored |= {name async for name, _ in _fields(redis, key)}
    return stored


async def schedule_problems(redis: Redis) -> dict[str, str]:
    """Schedule -> why the leader cannot submit it."""
    found: Any = await redis.execute_command("HGETALL", keys.PROBLEMS)
    pairs = found.items() if isinstance(found, Mapping) else zip(found[::2], found[1::2], strict=True)
    return {text_of(schedule): text_of(problem) for schedule, problem in pairs}


async def publish_problems(redis: Redis, problems: Mapping[str, str]) -> None:
    """Replace what is told of schedules that cannot be submitted."""
    told = list(problems.items())
    async with redis.pipeline(transaction=False) as pipe:
        pipe.execute_command("UNLINK", keys.PROBLEMS)
        for first in range(0, len(told), _PROBLEMS_BATCH):
            pipe.execute_command(
                "HSET", keys.PROBLEMS, *chain.from_iterable(told[first : first + _PROBLEMS_BATCH])
            )
        await pipe.execute()
