"""Background work is cancelled on request."""

from __future__ import annotations

import asyncio

from diracx.tasks.plumbing._util.tasks import cancel_and_wait


async def test_a_task_that_swallows_its_first_cancellation_is_cancelled_again() -> None:
    begun = asyncio.Event()
    lost = 0

    async def forgetful() -> None:
        nonlocal lost
        while True:
            try:
                begun.set()
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                if lost == 2:
                    raise
                lost += 1  # as a client library does when its reply comes at the same moment

    task = asyncio.create_task(forgetful())
    await begun.wait()
    async with asyncio.timeout(30):
        await cancel_and_wait(task)
    assert task.cancelled()
    assert lost == 2


async def test_closing_after_a_failure_raises_nothing() -> None:
    async def fails() -> None:
        raise ValueError("not awaited")

    failing = asyncio.create_task(fails())
    await asyncio.wait([failing])
    await cancel_and_wait(failing)
