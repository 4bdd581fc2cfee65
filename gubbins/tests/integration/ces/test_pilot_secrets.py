"""Secrets of pilots that run on this host; `support.pilot_secrets` is also for the sites of other files."""

from __future__ import annotations

import base64
import os
import subprocess
from pathlib import Path

import pytest
from support.pilot_secrets import URL, Place, assert_only_the_pilot_can_read_its_secret
from support.sites.sshd import Sshd
from support.waiting import until

from gubbins.ces import CEDescription, Observed, PilotAtCE, PilotIdentity
from gubbins.ces.arc.xrsl import UNPACK_AND_RUN, VARIABLE
from gubbins.ces.slurm import SlurmBackend, SlurmSettings
from gubbins.domain.pilot_states import MyPilotStatus

NEVER_ENDS = "mkdir .pilot.Xy3; echo token > .pilot.Xy3/token; echo begun >&2; trap '' TERM; sleep 600; exit 0"


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


async def test_a_killed_pilot_leaves_its_output_and_no_secret(place: Place) -> None:
    place.settings |= {"default_script": NEVER_ENDS, "kill_after_seconds": 0, "keep": "failed"}
    pilot = PilotAtCE("stamp", "vo", identity=PilotIdentity(URL, "secret"))
    async with place.open() as backend:
        await backend.submit([pilot])
        await until(lambda: any(place.directory.rglob("token")), "it has a token")
        await backend.cancel([pilot])

        async def failed() -> bool:
            return (await backend.poll([pilot]))["stamp"].state is Observed.FAILED

        await until(failed, "it has ended")
        await backend.cleanup([pilot._replace(status=MyPilotStatus.FAILED)])
        assert (await backend.output(pilot)).stderr == "begun\n"
    assert [path for path in place.directory.rglob("*") if path.name.startswith((".pilot", "secret"))] == []


async def test_a_job_that_never_started_leaves_no_secret(tmp_path: Path) -> None:
    (tmp_path / "stamp").mkdir()
    (tmp_path / "stamp" / "secret").write_text("secret")
    backend = SlurmBackend(CEDescription("ce", 1, 1.0), SlurmSettings(directory=tmp_path))
    await backend.cleanup([PilotAtCE("stamp", "vo", status=MyPilotStatus.FAILED)])
    assert [path.name for path in (tmp_path / "stamp").iterdir()] == ["ended"]


def test_only_the_user_of_the_job_can_read_the_unpacked_secret(tmp_path: Path) -> None:
    packed = base64.b64encode(b"stat -c %a .gubbins-pilot").decode()
    command = ["/bin/sh", "-c", f"umask 022; {UNPACK_AND_RUN}"]
    environment = {"PATH": os.environ["PATH"], VARIABLE: packed}
    assert subprocess.check_output(command, cwd=tmp_path, env=environment) == b"600\n"
