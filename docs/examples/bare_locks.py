"""A lock outside any task."""

from diracx.tasks.plumbing import MutexLock
from diracx.tasks.plumbing.lock_registry import JOB
from redis.asyncio import Redis


async def work_on(job_id: int, redis: Redis) -> bool:
    """False when another process holds it."""
    lock = MutexLock(JOB, job_id, ttl_ms=10_000)
    if not await lock.acquire(redis):
        return False
    try:
        ...  # for longer than ten seconds: `await lock.extend(redis)` now and then
        return True
    finally:
        await lock.release(redis)
