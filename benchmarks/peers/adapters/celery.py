"""Celery on Redis, with the settings of its guide for many short tasks. It has no bulk call."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from celery import Celery

from ..meter import sample, tick
from .base import NAP_SECONDS, Client, redis_url, stores_results

app = Celery("bench", broker=redis_url(), backend=redis_url() if stores_results() else None)
app.conf.update(
    task_ignore_result=not stores_results(),
    task_store_errors_even_if_ignored=False,
    worker_prefetch_multiplier=100,
    worker_send_task_events=False,
    task_send_sent_event=False,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
    result_expires=3600,
)


@app.task(name="noop")
def noop(number: int) -> None:
    tick()


@app.task(name="return_one")
def return_one(number: int) -> int:
    tick()
    return 1


@app.task(name="nap")
def nap(number: int) -> None:
    tick()
    time.sleep(NAP_SECONDS)


@app.task(name="clock")
def clock(sent: float) -> None:
    sample(time.monotonic() - sent)


@app.task(name="due")
def due(moment: float) -> None:
    sample(time.time() - moment)


_BY_NAME: dict[str, Any] = {"noop": noop, "return_one": return_one, "nap": nap, "clock": clock, "due": due}


class _Client(Client):
    async def submit(self, task: str, argument: Any) -> None:
        _BY_NAME[task].delay(argument)

    async def submit_at(self, task: str, argument: Any, moment: float) -> None:
        _BY_NAME[task].apply_async((argument,), eta=datetime.fromtimestamp(moment, UTC))


client = _Client
