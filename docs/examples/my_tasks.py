"""A first task."""

from dataclasses import dataclass

from diracx.tasks.plumbing import BaseTask


@dataclass
class Hello(BaseTask):
    """Greets somebody."""

    name: str

    async def execute(self) -> str:
        return f"Hello, {self.name}!"
