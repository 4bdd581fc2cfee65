"""The first task of the README runs."""

from __future__ import annotations

import re
import shlex

from diracx.tasks.testing.server import free_port
from support.paths import ROOT

README = ROOT / "README.md"


def test_the_first_task_of_the_readme_runs(cli, tmp_path):
    text = README.read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    commands = re.findall(r"^diracx-task-run (.+)$", text, re.MULTILINE)
    start, submit = (shlex.split(command) for command in commands[:2])
    assert start[0] == "dev"
    assert submit[0] == "submit"
    assert len([line for line in code.splitlines() if line]) <= 10, "a first task in ten lines"
    port = str(free_port())
    start[start.index("7379")] = port
    submit[-1] = submit[-1].replace("7379", port)
    (tmp_path / "my_tasks.py").write_text(code)
    dev = cli.start(*start)
    dev.until("ready: medium")
    result = cli(*submit)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[1] == "Result: Hello world"
