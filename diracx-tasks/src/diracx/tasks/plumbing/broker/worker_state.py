"""State that a worker writes to the server outside its event loop, its reports, and how both are read."""

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

#: The id of a task that is cancelled.
CANCELLED_CHANNEL = keys.CANCELLED
#: In how many ms something earlier is due.
WAKE_CHANNEL = keys.WAKE_WORKERS
#: A lease (ms) that is shorter than all others.
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
    """Renew all a worker holds. Returns the positions of lost entries, of lost locks and of cancelled entries,
    the dataset id, the shortest lease of all workers (ms), and for how long from now (ms) no lease can end.

    Args:
        dataset_id: what the last call returned. When the server has another, its data were lost, or it went back
            to earlier ones: nothing of what the worker runs is lost, but what another worker has by now.
        shortest_ms: what the last call returned, if the server need not look whether its lists are complete: that
            is to be done now and then.
        may_be_declared_dead: the lease of the worker may have ended.
    """
    known = "" if shortest_ms is None else shortest_ms
    run_id = redis.run_id() if isinstance(redis, ControlConnection) else ""
    args = [consumer, lease_ms, pack(entries), pack(locks), dataset_id, known, run_id, int(may_be_declared_dead)]
    *replies, now_in, shortest_ms, quiet_ms = script("renew").run(redis, args=args)
    if isinstance(redis, ControlConnection) and redis.run_id() != run_id:
        raise RedisConnectionError("another server has answered")
    lost_entries, lost_locks, cancelled = ([int(position) - 1 for position in reply] for reply in replies)
    return lost_entries, lost_locks, cancelled, now_in.decode(), int(shortest_ms), int(quiet_ms)


def hand_back(
    redis: SyncRedis | ControlConnection,
    consumer: str,
    streams: Sequence[str],
    known: Sequence[tuple[str, str]],
) -> None:
    """Put back into their queues what is reserved for the worker, and not among what it knows to hold (stream and
    entry).
    """
    held = pack([f"{stream} {entry}" for stream, entry in known])
    script("recover").run(redis, streams, [consumer, held, pack([]), 0, 0, 1])


def end_wait(redis: SyncRedis, consumer: str) -> None:
    """End a worker's wait for tasks on the server, which gives it none after this."""
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
    """Tell what a worker does.

    Args:
        sums_older_ms: add up all sums that workers have told, if the first of them is older than that.

    Returns:
        The server's time in ms, whether it knows what the worker said before, and whether there are more sums.
    """
    packed = pack(added) if added else b""
    older = "" if sums_older_ms is None else sums_older_ms
    args = [worker, number, line, running, packed, int(last), QUEUES, older]
    now_ms, known, more = await script("report")(redis, args=args)
    return int(now_ms), bool(known), bool(more)


async def send_sums(redis: Redis, sums: Sequence[Any], ttl_ms: int, *, again: bool) -> int:
    """Send sums without a report; the report of some worker adds them up. Returns how many wait.

    Args:
        ttl_ms: how long they wait at most.
        again: the last answer was lost, and with it perhaps that they are the first.
    """
    waiting: int = await redis.execute_command("RPUSH", keys.SUMS, pack(sums))
    if waiting == 1 or again:
        await redis.pexpire(keys.SUMS, ttl_ms)
    return waiting


def report_blocked(redis: SyncRedis, worker: str, blocked: bytes, running: bytes) -> None:
    """Say what blocks the event loop of a worker (empty: nothing any more), and what it runs."""
    script("blocked").run(redis, args=[worker, blocked, running])


def control_channels(worker: str) -> tuple[str, ...]:
    """The channels that a worker listens to: ids of tasks that it runs and that are cancelled, of others that are
    cancelled, that something earlier is due, and that a worker has a shorter lease than all others.
    """
    return keys.CANCELLED_CHANNEL_PREFIX + worker, CANCELLED_CHANNEL, WAKE_CHANNEL, LEASES_CHANNEL


async def leases(redis: Redis) -> dict[str, float]:
    """End of the lease of each worker (ms); below zero for those that are dead: see lua/reclaim.lua."""
    return await _scores(redis, keys.ALIVE)


async def report_times(redis: Redis) -> dict[str, float]:
    """Time of the last report of each worker (ms)."""
    return await _scores(redis, keys.REPORTING)


async def _scores(redis: Redis, key: str) -> dict[str, float]:
    return {text_of(name): float(score) async for name, score in redis.zscan_iter(key, count=SCANNED)}


def report_key(worker: str) -> str:
    """The key of a worker's report, for messages."""
    return keys.REPORT_PREFIX + worker


async def reports(redis: Redis, workers: Sequence[str], *fields: str) -> dict[str, list[bytes | None]]:
    """Read these fields of the report of each worker."""
    async with redis.pipeline(transaction=False) as pipe:
        for name in workers:
            pipe.execute_command("HMGET", report_key(name), *fields)
        return dict(zip(workers, await pipe.execute() if workers else [], strict=True))
