"""Schema version of the data: whether two builds can share one server."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import diracx.tasks
import pytest
from support.warm_commands import WarmCommands

from benchmarks.compat.scenarios import Tally, World, world

pytestmark = pytest.mark.timeout(300)
OURS = Path(diracx.tasks.__path__[0])


@pytest.fixture
def later(tmp_path: Path, warm_commands: WarmCommands) -> Iterator[World]:
    """A server, and copies of our build whose data have version 2: `kin` works beside 1, `stranger` does not."""
    with world(tmp_path / "world", published=False) as new:
        new.popen = warm_commands.popen
        for name, oldest in (("kin", 1), ("stranger", 2)):
            copy = new.copies[name] = tmp_path / name
            shutil.copytree(OURS, copy / "diracx" / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
            module = copy / "diracx/tasks/plumbing/broker/schema_version.py"
            text = re.sub(r"^VERSION = 1$", "VERSION = 2", module.read_text(), flags=re.MULTILINE)
            module.write_text(re.sub(r"^OLDEST = 1$", f"OLDEST = {oldest}", text, flags=re.MULTILINE))
        yield new


def test_a_compatible_build_works_beside_this_one_and_can_be_rolled_back(later: World) -> None:
    before = later.both("ours")
    later.submit("ours", 0)
    later.until_ended(10)
    new = later.both("kin")
    later.submit("ours", 1000)
    later.until_ended(60)
    later.end(before, kill=False)
    later.submit("ours", 2000)
    later.until_ended(110)
    before = later.both("ours")  # back again
    later.submit("ours", 3000)
    later.end(new, kill=False)
    tally = later.judge()
    assert tally == Tally()
    ran = [{pid for *_, pid, _ in later.ends()} >= {worker.pid} for worker in (before[0], new[0])]
    assert ran == [True, True], "both have run tasks"


def test_processes_refuse_data_of_a_newer_schema(later: World) -> None:
    before = later.both("ours")
    later.submit("ours", 0)
    later.until_ended(10)
    later.both("stranger")
    later.submit("ours", 1000)
    assert [process.wait(60) for process in before] == [1, 1], "what runs stops"
    output = (later.directory / "ours.log").read_text()
    assert output.count("Redis has data of schema 2, and this version of diracx-tasks knows schema 1") == 2, output
    again = [later.worker("ours"), later.start("ours", "scheduler")]
    assert [process.wait(60) for process in again] == [1, 1], "and does not start again"
    assert (later.directory / "ours.log").read_text().count("has data of schema 2") == 4
    tally = later.judge()
    assert tally == Tally()
