"""Submits tasks through an adapter, in the peer's environment: `python -m benchmarks.peers.client ADAPTER JSON`.

JSON: `{"do": "one" | "bulk", "task": NAME, "number": N}`, `{"do": "paced", "number": N, "interval": SECONDS}` or
`{"do": "later", "number": N, "after": SECONDS, "within": SECONDS}`. Prints `{"seconds": …}`. The first of many is
not in it: it opens connections, and imports what is imported lazily.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import time
from typing import Any

from .adapters.base import Client

#: Tasks in one bulk call.
BULK = 1_000
#: No-ops before latencies are measured.
WARM_UP = 20


async def serve(client: Client, order: dict[str, Any]) -> float:
    number = order["number"]
    async with client:
        match order["do"]:
            case "one":
                await client.submit(order["task"], 0)
            case "bulk":
                await client.submit_many(order["task"], [0])
            case "paced":
                for index in range(WARM_UP):
                    await client.submit("noop", index)
                    await asyncio.sleep(order["interval"])
        begin = time.perf_counter()
        match order["do"]:
            case "one":
                for index in range(1, number):
                    await client.submit(order["task"], index)
            case "bulk":
                for first in range(1, number, BULK):
                    arguments = range(first, min(number, first + BULK))
                    await client.submit_many(order["task"], arguments)
            case "paced":
                for index in range(number):
                    pause = begin + index * order["interval"] - time.perf_counter()
                    await asyncio.sleep(max(0.0, pause))
                    await client.submit("clock", time.monotonic())
            case "later":
                start = time.time() + order["after"]
                for index in range(number):
                    due = start + order["within"] * index / number
                    await client.submit_at("due", due, due)
        return time.perf_counter() - begin


def main() -> None:
    adapter, order = sys.argv[1], json.loads(sys.argv[2])
    client: Client = importlib.import_module(f"benchmarks.peers.adapters.{adapter}").client()
    try:
        import uvloop
    except ImportError:
        seconds = asyncio.run(serve(client, order))
    else:
        seconds = uvloop.run(serve(client, order))
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
