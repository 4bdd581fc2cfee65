"""Dependencies of a task are injected by type."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

from diracx.tasks.plumbing import BaseTask
from fastapi import Depends


class Catalogue:
    """Some service with a connection."""

    async def sites(self) -> list[str]:
        return ["CERN", "PIC"]


@asynccontextmanager
async def catalogue() -> AsyncIterator[Catalogue]:
    """Opened before `execute`, closed after it, however it ends."""
    yield Catalogue()


@dataclass
class CountSites(BaseTask):
    async def execute(self, service: Annotated[Catalogue, Depends(catalogue)]) -> int:
        return len(await service.sites())
