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
