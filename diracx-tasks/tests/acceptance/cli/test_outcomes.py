"""Worker processes survive misbehaving tasks, and refuse invalid ones."""

from __future__ import annotations

import pytest

ABRUPT = """
import asyncio
import os
from dataclasses import dataclass

from diracx.tasks.plumbing import BaseTask

ERRORS = {"KeyboardInterrupt": KeyboardInterrupt, "SystemExit": SystemExit}


@dataclass
class Abrupt(BaseTask):
    error: str
    where: str

    async def execute(self):
        if self.where == "execute":
            raise ERRORS[self.error]
        if self.where == "task group":
            async with asyncio.TaskGroup() as group:
                group.create_task(self._end())
                await asyncio.sleep(60)
        if self.where == "callback":
            asyncio.get_running_loop().call_soon(self._raise)
            await asyncio.sleep(0.05)
        if self.where == "stop":
            asyncio.get_running_loop().stop()
            await asyncio.sleep(0.05)
        if self.where in ("child", "end of a child"):
            if child := os.fork():
                return f"went on, child: {os.waitpid(child, 0)[1] >> 8}"
            if self.where == "child":
                raise ERRORS[self.error]
        return "went on"

    def _raise(self):
        raise ERRORS[self.error]

    async def _end(self):
        self._raise()
"""
MODULE = ("--module", "abrupt.py")


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_worker_goes_on_when_a_part_of_a_task_would_end_the_process(served, redis_url, tmp_path, loop):
    (tmp_path / "abrupt.py").write_text(ABRUPT)
    if loop == "asyncio":  # what is imported from here comes first
        (tmp_path / "uvloop.py").write_text("raise ImportError('not installed')")
        served.environment["PYTHONPATH"] = str(tmp_path)
    worker = served.start("worker", *MODULE, new_python=True)
    worker.until("ready")
    for error in ("KeyboardInterrupt", "SystemExit"):
        for where in ("execute", "task group", "callback", "stop", "child", "end of a child"):
            args = ("--args", f'["{error}", "{where}"]')
            submitted = served("submit", "abrupt:Abrupt", *args, "--wait", *MODULE)
            expected = error if where in ("execute", "task group") else "went on"
            assert expected in submitted.stdout + submitted.stderr, worker.output
    assert worker.process.poll() is None, worker.output
    assert worker.output.count("outside of `execute`; the worker continues") >= 4
    worker.process.terminate()
    assert worker.ends() == 0, worker.output


@pytest.mark.parametrize(
    ("written", "what"),
    [
        ("def execute(self): pass", "not async"),
        ("async def execute(self): yield", "an async generator"),
        ("def execute(self): yield", "a generator"),
        ("@staticmethod\n    async def execute(): pass", "of type staticmethod"),
        ("@classmethod\n    async def execute(cls): pass", "of type classmethod"),
        ("@property\n    def execute(self): pass", "of type property"),
        ("execute = partial(print)", "of type partial"),
        ("execute = 5", "of type int"),
    ],
)
def test_a_worker_refuses_to_start_with_a_task_whose_execute_is_not_awaitable(served, tmp_path, written, what):
    head = "from functools import partial\nfrom diracx.tasks.plumbing import BaseTask\n\n\n"
    (tmp_path / "odd.py").write_text(f"{head}class Odd(BaseTask):\n    {written}\n")
    refused = served("worker", "--module", "odd.py")
    assert refused.returncode == 1
    line = refused.stderr.strip().splitlines()[-1]
    assert f"odd.Odd: `execute` is {what}" in line
    assert "odd.py:5" in line or "odd.py:6" in line
    assert "write it as `async def execute(self, …)`" in line
