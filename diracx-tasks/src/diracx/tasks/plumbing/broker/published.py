"""Compatibility with the published package 0.7, whose data may be in Redis and whose processes may still run.

Its delayed tasks and groups are converted by `lua/_published*.lua` as they are met; `scheduling.py` holds its lock
of the leading scheduler together with ours. To forget 0.7, delete these, `lua/finished.lua` and their callers.
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

#: A worker of 0.7 asks for messages every 2 s. One that has not for `LIVING_MS` has ended or blocks its event
#: loop, and after `DEAD_MS` its messages are taken over.
LIVING_MS, DEAD_MS = 10_000, 30_000
#: After so long it takes over messages of others itself.
IDLE_MS = 600_000
#: Entries that one script call looks at.
FINISHED_BATCH = 250
_SEEN_SECONDS = 86_400
_BATCH = 100
_NAME = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}")

#: Due times of ours are in ms, those of 0.7 in seconds.
_OURS_FROM = 1e11
_EXTENSIONS = (msgpack.ExtType, msgpack.Timestamp)

Consumers = Sequence[Mapping[str, Any]]


def silent_ms(streams: Sequence[Consumers]) -> dict[bytes, int]:
    """Worker of 0.7 -> for how long it has not asked for messages, from the consumers of streams."""
    found: dict[bytes, int] = {}
    for consumer in (each for consumers in streams for each in consumers):
        if _NAME.fullmatch(consumer["name"]):
            found[consumer["name"]] = min(consumer["idle"], found.get(consumer["name"], consumer["idle"]))
    return found


async def living_worker(redis: Redis) -> str | None:
    """Names a worker of 0.7 that asks for messages, on one line; None when there is none."""
    async with redis.pipeline(transaction=False) as pipe:
        for stream in keys.ALL_STREAM_NAMES:
            pipe.xinfo_consumers(stream, keys.GROUP)
        found = await pipe.execute(raise_on_error=False)
    silent = silent_ms([consumers for consumers in found if not isinstance(consumers, ResponseError)])
    for name, ms in silent.items():
        if ms < LIVING_MS:
            return f"worker {text_of(name)} of diracx-tasks 0.7, which asked for tasks {ms / 1000:.1f} s ago"
    return None


async def look_after(redis: Redis, streams: Sequence[Consumers], now_ms: int) -> None:
    """Note the workers of 0.7: those that are silent are to be reclaimed, and what they have finished is deleted.

    Args:
        streams: the consumers of each stream.
    """
    ends_ms = {}
    for name, ms in silent_ms(streams).items():
        ends_ms[name] = now_ms + (IDLE_MS if ms < LIVING_MS else DEAD_MS - ms)
        if ms < LIVING_MS:
            text = "worker %s of diracx-tasks 0.7 takes tasks beside us: it tells no group of ours; stop it"
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


# --- the way back -------------------------------------------------------------------------------------------


class StillRunningError(Exception):
    """Processes of ours run, and would change what is converted. The message names one."""


async def downgrade(redis: Redis) -> dict[str, int]:
    """Give everything that waits the form of 0.7: what was delayed, reserved or resumed, and groups.

    Safe to repeat. Nothing of ours may run meanwhile.

    Returns:
        How many `reserved`, `delayed` and `groups` were converted; `kept`: delayed tasks that 0.7 would lose for
        the types of their arguments. They stay as they are.

    Raises:
        StillRunningError: when a worker or scheduler of ours runs.
    """
    seconds, microseconds = await redis.time()
    now_ms = seconds * 1000 + microseconds // 1000
    if living := await redis.zrangebyscore(keys.ALIVE, now_ms, "+inf", start=0, num=1):
        raise StillRunningError(f"worker {text_of(living[0])} runs, or was lost less than its lease ago")
    if await redis.exists(keys.LEADER):
        raise StillRunningError("a scheduler leads, or was lost some seconds ago")
    for stream in keys.ALL_STREAM_NAMES:  # 0.7 makes groups that leave out what is there
        with suppress(ResponseError):
            await redis.xgroup_create(stream, keys.GROUP, "0", mkstream=True)
    reserved = sum([await _queue_again(redis, stream) for stream in keys.EVERY_STREAM])
    delayed, kept = await _delayed_as_published(redis, now_ms)
    return {"reserved": reserved, "delayed": delayed, "groups": await _groups_as_published(redis), "kept": kept}


async def _queue_again(redis: Redis, stream: str) -> int:
    """Put what is in hand, or was resumed, into the queue once more. Returns how many."""
    target, first, moved = stream.removesuffix(keys.HANDOVER), "-", 0
    while entries := await redis.execute_command("XRANGE", stream, first, "+", "COUNT", _BATCH):
        first = "(" + text_of(entries[-1][0])
        for entry, fields in entries:
            if target == stream:
                try:
                    pending: Any = await redis.xpending_range(stream, keys.GROUP, entry, entry, 1)
                except ResponseError:  # no group: nobody has any
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
        await redis.zrangebyscore(keys.DELAYED, _OURS_FROM, "+inf", kept, _BATCH, withscores=True),
    ):
        stored: Any = await redis.execute_command("HMGET", keys.DELAYED_DATA, *(task for task, _ in found))
        async with redis.pipeline(transaction=True) as pipe:
            for (task, due_ms), whole in zip(found, stored, strict=True):
                header, _, data = (whole or b"").partition(b"\n")
                if not _promotable(data):
                    kept += 1
                    continue
                waits = header.split(b" ")[1] in (b"lock", b"rate")  # it asks again
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
    """True if it has no value of an extension type, as a moment: 0.7 loses what is delayed and has one."""
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
