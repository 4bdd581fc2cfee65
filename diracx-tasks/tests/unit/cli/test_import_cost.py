"""Imports of the command line."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("diracx.tasks.cli", "redis sqlalchemy fastapi pydantic starlette prometheus_client"),
        ("diracx.tasks.plumbing", "redis sqlalchemy fastapi pydantic msgpack"),
        ("diracx.tasks.plumbing.broker.streams", "redis sqlalchemy pydantic"),
    ],
)
def test_importing_a_module_loads_no_heavy_library(module: str, without: str) -> None:
    names = without.split()
    code = f"import sys, {module}; print(*[name for name in {names!r} if name in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert loaded == []


@pytest.mark.parametrize("package", ["diracx.tasks.cli", "gubbins.cli"])
def test_ctrl_c_while_a_command_is_imported_prints_nothing(package: str) -> None:
    code = f"""
import sys, {package}
class Interrupt:
    def find_spec(self, *_): raise KeyboardInterrupt
sys.argv, sys.meta_path = ["command", "status"], [Interrupt()]
{package}.main()
"""
    pytest.importorskip(package.partition(".cli")[0])
    interrupted = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (interrupted.returncode, interrupted.stdout, interrupted.stderr) == (1, "", "")
