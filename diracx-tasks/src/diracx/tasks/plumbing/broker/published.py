"""Compatibility with the published package 0.7, whose data may be in Redis and whose processes may still run.

`lua/_published*.lua` convert its delayed tasks and groups when scripts read them; `scheduling.py` takes its leader
lock as well. To drop the compatibility, delete these, `lua/finished.lua` and their callers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import msgpack
from redis.exceptions import ResponseError

from . import keys
from .groups import group_ids
from .models import TaskMessage
from .scripts import script
from .sizes import CALL_BYTES
from .stored import text_of

if TYPE_CHECKING:
    from redis.asyncio import Redis

logger = logging.getLogger(__name__)

#: A worker of 0.7 polls for messages every 2 s. Without a poll for `LIVING_MS` it has ended or its event loop is
#: blocked; after `DEAD_MS` its messages are reclaimed.
LIVING_MS, DEAD_MS = 10_000, 30_000
#: Idle time after which a worker of 0.7 reclaims messages of other workers.
IDLE_MS = 600_000
#: Entries that one script call examines.
FINISHED_BATCH = 250
_SEEN_SECONDS = 86_400
_BATCH = 100
_NAME = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}")

#: Scores from here on are due times of this version, in ms; those of 0.7 are in seconds.
_FIRST_MS_SCORE = 1e11
_EXTENSIONS = (msgpack.ExtType, msgpack.Timestamp)

Consumers = Sequence[Mapping[str, Any]]


def silent_ms(streams: Sequence[Consumers]) -> dict[bytes, int]:
    """Worker of 0.7 -> time since its last poll for messages (ms), from the consumers of streams."""
    found: dict[bytes, int] = {}
    for consumer in (each for consumers in streams for each in consumers):
        if _NAME.fullmatch(consumer["name"]):
            found[consumer["name"]] = min(consumer["idle"], found.get(consumer["name"], consumer["idle"]))
    return found


async def living_worker(redis: Redis) -> str | None:
    """Describe a running worker of 0.7, on one line; None when there is none."""
    async with redis.pipeline(transaction=False) as pipe:
        for stream in keys.ALL_STREAM_NAMES:
            pipe.xinfo_consumers(stream, keys.GROUP)
        found = await pipe.execute(raise_on_error=False)
    silent = silent_ms([consumers for consumers in found if not isinstance(consumers, ResponseError)])
    for name, ms in silent.items():
        if ms < LIVING_MS:
            return f"worker {text_of(name)} of diracx-tasks 0.7, which fetched tasks {ms / 1000:.1f} s ago"
    return None


async def track_workers(redis: Redis, streams: Sequence[Consumers], now_ms: int) -> None:
    """Enter workers of 0.7 into the list of workers, to be reclaimed when silent, and delete their finished
    entries.

    Args:
        streams: consumers of each stream.
    """
    ends_ms = {}
    for name, ms in silent_ms(streams).items():
        ends_ms[name] = now_ms + (IDLE_MS if ms < LIVING_MS else DEAD_MS - ms)
        if ms < LIVING_MS:
            text = "worker %s of diracx-tasks 0.7 still takes tasks, and updates no callback groups: stop it"
            logger.error(text, text_of(name))
    if ends_ms:
        await redis.set(keys.PUBLISHED_SEEN, len(ends_ms), ex=_SEEN_SECONDS)
    if await redis.exists(keys.PUBLISHED_SEEN):
        await _delete_finished(redis)
    if ends_ms:
        await redis.zadd(keys.ALIVE, ends_ms)


async def _delete_finished(redis: Redis) -> None:
    total = 0
    for stream in keys.ALL_STREAM_NAMES:
        first = "-"
        while first:
            reply: Any = await script("finished")(redis, [stream], [first, FINISHED_BATCH, CALL_BYTES])
            first, total = text_of(reply[0]), total + reply[1]
    if total:
        logger.info("%d entries are deleted that diracx-tasks 0.7 had finished", total)


# --- downgrade ----------------------------------------------------------------------------------------------


class StillRunningError(Exception):
    """Processes of this version run, and would change the converted data. The message names one."""


async def downgrade(redis: Redis) -> dict[str, int]:
    """Convert tasks and groups to the format of 0.7: delayed, reserved and resumed tasks, and callback groups.

    Safe to repeat. No process of this version may run meanwhile.

    Returns:
        Numbers of converted `reserved`, `delayed` and `groups`; `kept`: number of delayed tasks that stay as they
        are, for 0.7 would lose them because of the types of their arguments.

    Raises:
        StillRunningError: when a worker or scheduler of this version runs.
    """
    seconds, microseconds = await redis.time()
    now_ms = seconds * 1000 + microseconds // 1000
    if living := await redis.zrangebyscore(keys.ALIVE, now_ms, "+inf", start=0, num=1):
        raise StillRunningError(f"worker {text_of(living[0])} runs, or was lost less than its lease ago")
    if await redis.exists(keys.LEADER):
        raise StillRunningError("a scheduler leads, or was lost some seconds ago")
    for stream in keys.ALL_STREAM_NAMES:  # 0.7 would create groups that skip the existing entries
        with suppress(ResponseError):
            await redis.xgroup_create(stream, keys.GROUP, "0", mkstream=True)
    reserved = sum([await _queue_again(redis, stream) for stream in keys.EVERY_STREAM])
    delayed, kept = await _delayed_as_published(redis, now_ms)
    return {"reserved": reserved, "delayed": delayed, "groups": await _groups_as_published(redis), "kept": kept}


async def _queue_again(redis: Redis, stream: str) -> int:
    """Move reserved and resumed entries into the queue of new tasks. Returns how many."""
    target, first, moved = stream.removesuffix(keys.RESUMED_SUFFIX), "-", 0
    while entries := await redis.execute_command("XRANGE", stream, first, "+", "COUNT", _BATCH):
        first = "(" + text_of(entries[-1][0])
        for entry, fields in entries:
            if target == stream:
                try:
                    pending: Any = await redis.xpending_range(stream, keys.GROUP, entry, entry, 1)
                except ResponseError:  # no consumer group: no entry is reserved
                    return moved
                if not pending:
                    continue
            async with redis.pipeline(transaction=True) as pipe:
                pipe.xack(stream, keys.GROUP, entry)
                pipe.xdel(stream, entry)
                pipe.xadd(target, {b"data": fields[b"data"]})
                await pipe.execute()
            moved += 1
    return moved


async def _delayed_as_published(redis: Redis, now_ms: int) -> tuple[int, int]:
    moved = kept = 0
    while found := cast(
        list[tuple[bytes, float]],
        await redis.zrangebyscore(keys.DELAYED, _FIRST_MS_SCORE, "+inf", kept, _BATCH, withscores=True),
    ):
        stored: Any = await redis.execute_command("HMGET", keys.DELAYED_DATA, *(task for task, _ in found))
        async with redis.pipeline(transaction=True) as pipe:
            for (task, due_ms), value in zip(found, stored, strict=True):
                header, _, data = (value or b"").partition(b"\n")
                if not _promotable(data):
                    kept += 1
                    continue
                waits = header.split(b" ")[1] in (b"lock", b"rate")  # due now: 0.7 tries the lock again
                pipe.zrem(keys.DELAYED, task)
                pipe.hdel(keys.DELAYED_DATA, task)
                pipe.zadd(keys.DELAYED, {data: (now_ms if waits else due_ms) / 1000})
                moved += 1
            await pipe.execute()
    for lock in await redis.zrange(keys.LINES, 0, -1):
        await redis.unlink(*keys.of_all_sizes(keys.WAITING_PREFIX, text_of(lock)))
    await redis.unlink(keys.LINES, *(() if kept else (keys.DELAYED_REASONS,)))
    return moved, kept


def _is_plain(value: Any) -> bool:
    """True if it has no value of a msgpack extension type, e.g. a datetime: 0.7 loses delayed tasks with one."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if isinstance(value, list) else not isinstance(value, _EXTENSIONS)


def _promotable(data: bytes) -> bool:
    try:
        return _is_plain(msgpack.unpackb(data, strict_map_key=False))
    except ValueError:
        return False


async def _groups_as_published(redis: Redis) -> int:
    converted = 0
    for group in await group_ids(redis):
        key = keys.GROUPS_PREFIX + group
        callback: Any = await redis.execute_command("HGET", key, "callback")
        ttl_ms: int = await redis.execute_command("PTTL", key)
        left: int = await redis.execute_command("SCARD", f"{key}:pending")
        left += await redis.execute_command("HLEN", f"{key}:failed")
        async with redis.pipeline(transaction=True) as pipe:
            if callback and ttl_ms > 0:
                message = TaskMessage.loadb(callback)
                as_published = msgpack.packb({"task_class": message.task_name, "args": message.task_args})
                pipe.set(f"{key}:callback", as_published, px=ttl_ms)
                pipe.set(f"{key}:remaining", left, px=ttl_ms)
                converted += 1
            pipe.unlink(key, *(f"{key}:{part}" for part in ("pending", "failed", "children", "results", "staged")))
            pipe.zrem(keys.GROUPS, group)
            await pipe.execute()
    return converted
