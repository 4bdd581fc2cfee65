"""A callback group: many tasks, and one after all of them."""

from dataclasses import dataclass

from diracx.tasks.plumbing import BaseTask, CallbackSpawner, ChildResults


@dataclass
class Chunk(BaseTask):
    number: int

    async def execute(self) -> int:
        if self.number < 0:
            raise ValueError(f"there is no chunk {self.number}")
        return self.number


@dataclass
class Assemble(BaseTask):
    name: str

    async def execute(self, results: ChildResults) -> str:
        chunks = [result.return_value for result in results.values()]
        return f"{self.name}: chunks {chunks}"


@dataclass
class CleanUp(BaseTask):
    async def execute(self) -> str:
        return "cleaned up"


@dataclass
class Split(BaseTask):
    chunks: int

    async def execute(self, spawn: CallbackSpawner) -> str:
        children = [Chunk(number) for number in range(self.chunks)]
        return await spawn(children, Assemble("survey"), on_failure=CleanUp())
