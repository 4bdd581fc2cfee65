"""Secrets of pilots that run on this host; `support.pilot_secrets` is also for the sites of other files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.pilot_secrets import Place, assert_only_the_pilot_can_read_its_secret
from support.sites.sshd import Sshd


@pytest.fixture(params=["local", "run_as", "ssh"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    match request.param:
        case "local":
            return Place("local", {"directory": str(tmp_path)}, tmp_path)
        case "run_as":
            if os.geteuid() != 0:
                pytest.skip("needs root")
            base = next(each for each in tmp_path.parents if each.name.startswith("pytest-of-"))
            for directory in (tmp_path, *(each for each in tmp_path.parents if each.is_relative_to(base))):
                directory.chmod(0o711)  # and not the directory of all temporary files
            return Place("local", {"directory": str(tmp_path / "ce"), "run_as": "nobody"}, tmp_path)
        case _:
            sshd: Sshd = request.getfixturevalue("sshd")
            return Place("ssh", sshd.settings | {"workdir": str(tmp_path / "ce")}, tmp_path)


async def test_only_the_pilot_can_read_its_secret(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    await assert_only_the_pilot_can_read_its_secret(place, caplog)
