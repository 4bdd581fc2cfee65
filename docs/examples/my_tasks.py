"""A first task."""

from dataclasses import dataclass

from diracx.tasks.plumbing import BaseTask


@dataclass
class Hello(BaseTask):
    """Greets a user."""

    name: str

    async def execute(self) -> str:
        return f"Hello, {self.name}!"
