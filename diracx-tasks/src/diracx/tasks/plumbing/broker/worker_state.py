"""Writes a worker's state to the server from threads, and its reports; reads both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from redis.exceptions import ConnectionError as RedisConnectionError

from . import keys
from .control import ControlConnection
from .scripts import EVERY_STREAM, QUEUES, pack, packed_settlements, script
from .stored import SCANNED, text_of

if TYPE_CHECKING:
    from redis import Redis as SyncRedis
    from redis.asyncio import Redis

    from .models import Settlement
    from .requests import Entry, LockSpec

#: Channel of ids of cancelled tasks.
CANCELLED_CHANNEL = keys.CANCELLED
#: Channel of new earliest due times (in how many ms).
WAKE_CHANNEL = keys.WAKE_WORKERS
#: Channel of leases (ms) that are shorter than all others.
LEASES_CHANNEL = keys.LEASES


def renew(
    redis: SyncRedis | ControlConnection,
    consumer: str,
    lease_ms: int,
    entries: Sequence[Entry],
    locks: Sequence[LockSpec],
    dataset_id: str = "",
    shortest_ms: int | None = None,
    may_be_declared_dead: bool = False,
) -> tuple[list[int], list[int], list[int], str, int, int]:
    """Renew the leases and locks of a worker.

    Args:
        dataset_id: the id that the last call returned. If the server has another one, its data were lost or
            replaced by earlier ones: the worker keeps its entries, except those that another worker has by now.
        shortest_ms: the shortest lease that the last call returned; None: also check that the server's lists are
            complete, which is needed now and then.
        may_be_declared_dead: the lease of the worker may have ended.

    Returns:
        The positions of lost entries, of lost locks and of cancelled entries, the dataset id, the shortest lease
        of all workers (ms), and the time in which no lease can end (ms).
    """
    known = "" if shortest_ms is None else shortest_ms
    run_id = redis.run_id() if isinstance(redis, ControlConnection) else ""
    args = [consumer, lease_ms, pack(entries), pack(locks), dataset_id, known, run_id, int(may_be_declared_dead)]
    *replies, now_in, shortest_ms, quiet_ms = script("renew").run(redis, args=args)
    if isinstance(redis, ControlConnection) and redis.run_id() != run_id:
        raise RedisConnectionError("another server has replied")
    lost_entries, lost_locks, cancelled = ([int(position) - 1 for position in reply] for reply in replies)
    return lost_entries, lost_locks, cancelled, now_in.decode(), int(shortest_ms), int(quiet_ms)


def requeue_unread(
    redis: SyncRedis | ControlConnection,
    consumer: str,
    streams: Sequence[str],
    known: Sequence[tuple[str, str]],
) -> None:
    """Requeue deliveries that are reserved for the worker but not held.

    Args:
        known: stream and entry of each delivery that the worker holds.
    """
    held = pack([f"{stream} {entry}" for stream, entry in known])
    script("fetch_unacknowledged").run(redis, streams, [consumer, held, pack([]), 0, 0, 1])


def end_wait(redis: SyncRedis, consumer: str) -> None:
    """End a worker's blocking read on the server, which reserves nothing for it after this."""
    redis.unlink(keys.WAIT_PREFIX + consumer)


def settle_now(redis: SyncRedis | ControlConnection, consumer: str, settlements: Sequence[Settlement]) -> None:
    """`settle` on a blocking connection, outside the event loop."""
    script("settle").run(redis, args=[consumer, "", *packed_settlements(settlements)])


def leave_now(redis: SyncRedis, consumer: str) -> None:
    """`leave` on a blocking connection."""
    script("leave").run(redis, args=[consumer, EVERY_STREAM])


async def report(
    redis: Redis,
    worker: str,
    number: int,
    line: bytes,
    running: bytes,
    added: Mapping[str, Any],
    last: bool,
    sums_older_ms: int | None = None,
) -> tuple[int, bool, bool]:
    """Publish the report of a worker.

    Args:
        line: state of the worker; empty: unchanged.
        running: its running tasks; empty: unchanged.
        sums_older_ms: add up the counters in the list, if the first of them are older than that; None: do not.

    Returns:
        The server's time (ms), whether it has the worker's earlier report, and whether there are more counters.
    """
    packed = pack(added) if added else b""
    older = "" if sums_older_ms is None else sums_older_ms
    args = [worker, number, line, running, packed, int(last), QUEUES, older]
    now_ms, known, more = await script("report")(redis, args=args)
    return int(now_ms), bool(known), bool(more)


async def send_sums(redis: Redis, sums: Sequence[Any], ttl_ms: int, *, again: bool) -> int:
    """Append counters to the list, which the next report of some worker adds up. Returns the length of the list.

    Args:
        ttl_ms: time to live of the list.
        again: the last reply was lost, so that the list may have no time to live yet.
    """
    waiting: int = await redis.execute_command("RPUSH", keys.SUMS, pack(sums))
    if waiting == 1 or again:
        await redis.pexpire(keys.SUMS, ttl_ms)
    return waiting


def report_blocked(redis: SyncRedis, worker: str, blocked: bytes, running: bytes) -> None:
    """Publish the task that blocks the event loop of a worker (empty: none any more), and the running tasks."""
    script("blocked").run(redis, args=[worker, blocked, running])


def control_channels(worker: str) -> tuple[str, ...]:
    """Channels that a worker subscribes to: ids of its cancelled running tasks, ids of all cancelled tasks, new
    earliest due times, and leases shorter than all others.
    """
    return keys.CANCELLED_CHANNEL_PREFIX + worker, CANCELLED_CHANNEL, WAKE_CHANNEL, LEASES_CHANNEL


async def leases(redis: Redis) -> dict[str, float]:
    """End of the lease of each worker (ms); below zero for dead workers: see lua/reclaim.lua."""
    return await _scores(redis, keys.ALIVE)


async def report_times(redis: Redis) -> dict[str, float]:
    """Time of the last report of each worker (ms)."""
    return await _scores(redis, keys.REPORTING)


async def _scores(redis: Redis, key: str) -> dict[str, float]:
    return {text_of(name): float(score) async for name, score in redis.zscan_iter(key, count=SCANNED)}


def report_key(worker: str) -> str:
    """Key of a worker's report."""
    return keys.REPORT_PREFIX + worker


async def reports(redis: Redis, workers: Sequence[str], *fields: str) -> dict[str, list[bytes | None]]:
    """Read these fields of the report of each worker."""
    async with redis.pipeline(transaction=False) as pipe:
        for name in workers:
            pipe.execute_command("HMGET", report_key(name), *fields)
        return dict(zip(workers, await pipe.execute() if workers else [], strict=True))
