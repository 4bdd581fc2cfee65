"""A task that must not run concurrently for one account."""

import asyncio
from dataclasses import dataclass

from diracx.tasks.plumbing import BaseLock, BaseTask, MutexLock, register_locked_object_type

ACCOUNT = register_locked_object_type("account")


@dataclass
class Settle(BaseTask):
    """Adds up one account. Two at a time would count twice."""

    account: str

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(ACCOUNT, self.account)]

    async def execute(self) -> str:
        await asyncio.sleep(0.2)
        return f"{self.account} is settled"
