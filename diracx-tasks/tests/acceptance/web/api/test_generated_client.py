"""The OpenAPI document from which DiracX generates clients."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.warm_commands import WarmCommands

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


_SCRIPT = """
import sys, pytest
sys.exit(pytest.main(["-p", "diracx.testing", "--import-mode=importlib", "-q", "test_generation.py"]))
"""


@pytest.mark.parametrize("enabled", ["", "false"])
def test_a_client_has_the_paths_of_tasks_unless_the_service_is_switched_off(
    tmp_path: Path, warm_commands: WarmCommands, enabled: str
) -> None:
    (tmp_path / "test_generation.py").write_text(_GENERATION)
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    (tmp_path / "generate.py").write_text(_SCRIPT)
    environment = {**os.environ, "DIRACX_SERVICE_TASKS_ENABLED": enabled}
    done = warm_commands.run([str(tmp_path / "generate.py")], cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout
    paths = json.loads((tmp_path / "openapi.json").read_text())["paths"]
    ours = {path for path in paths if path.startswith("/api/tasks")}
    assert len(paths) > len(ours) + 20
    assert bool(ours) == (enabled != "false")
