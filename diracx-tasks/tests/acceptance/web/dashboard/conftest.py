"""A small system whose dashboard is open in a browser. Everything runs in the event loop of the module."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio
from redis.asyncio import Redis
from support.dashboard_browser import Tab, tab_of
from support.dashboard_world import WRITER, World, small_world


@pytest_asyncio.fixture(loop_scope="module")
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def world(redis_url: str) -> AsyncIterator[World]:
    async with small_world(redis_url) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def tab(world: World, browser: Any) -> AsyncIterator[Tab]:
    async with tab_of(browser, world.app, WRITER) as made:
        yield made
