"""The document that DiracX makes clients from, in the way in which it makes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

#: As `diracx.testing.client_generation` asks for it, but for the simulated S3, which our routes do not use.
_GENERATION = """
import pathlib, pytest
from diracx.core.settings import SandboxStoreSettings

pytestmark = pytest.mark.enabled_dependencies([])

@pytest.fixture(scope="session")
def test_sandbox_settings():
    return SandboxStoreSettings(bucket_name="none", s3_client_kwargs={})

def test_regenerate_client(client_factory):
    with client_factory.unauthenticated() as client:
        pathlib.Path(__file__).with_name("openapi.json").write_text(client.get("/api/openapi.json").text)
"""


@pytest.mark.parametrize("enabled", ["", "false"])
def test_a_client_has_the_paths_of_tasks_unless_the_service_is_switched_off(tmp_path: Path, enabled: str) -> None:
    (tmp_path / "test_generation.py").write_text(_GENERATION)
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "diracx.testing", "--import-mode=importlib", "-q", "."],
        cwd=tmp_path,
        env={**os.environ, "DIRACX_SERVICE_TASKS_ENABLED": enabled},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    paths = json.loads((tmp_path / "openapi.json").read_text())["paths"]
    ours = {path for path in paths if path.startswith("/api/tasks")}
    assert len(paths) > len(ours) + 20
    assert bool(ours) == (enabled != "false")
