"""Submission from a script, a notebook or a cron job."""

import asyncio
import sys
from datetime import UTC, datetime, timedelta

from diracx.tasks.plumbing import schedule_many, task_broker
from my_tasks import Hello

REGISTRY = {"my_tasks:Hello": Hello}  # left out: all installed tasks


async def main(redis_url: str | None = None) -> list[str]:
    async with task_broker(redis_url, registry=REGISTRY) as broker:
        # One, with its result.
        task_id = await Hello("world").schedule(labels={"result_ttl_seconds": 60})
        result = await broker.wait_result(task_id, timeout=5)
        print(result.return_value)

        # Many at once: one round trip for every 500.
        task_ids = await schedule_many([Hello(name) for name in ("Ada", "Grace", "Mary")])

        # Not before tomorrow.
        await Hello("later").schedule(at_time=datetime.now(UTC) + timedelta(days=1))
        return task_ids


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:2]))
