"""Each back end hands a pilot its secret in a file of its own, and shows it to nobody else."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import os
import secrets
import stat
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sites.arc import ArcSite
from sites.gridengine import GridEngineSite
from sites.htcondor import HTCondorSite
from sites.sshd import Sshd
from watching import ENDED, observe

from examples.demo.slurm import SlurmSite
from gubbins.ces import CEDescription, Observed, PilotAtCE, PilotIdentity, make_backend
from gubbins.ces.batch import BatchBackend, BatchSettings

pytestmark = [pytest.mark.timeout(240)]

URL = "https://diracx.example.org/api/my_pilots"
SCRIPT = """\
stat -c 'mode %a' "${PILOT_SECRET_FILE:-/nowhere}"
echo "hash $(sha256sum < "${PILOT_SECRET_FILE:-/dev/null}")"
echo "url ${PILOT_API_URL:-none}"
env | sed 's/^/env /'
sleep 3
"""


@dataclass
class Place:
    """A back end, and the directory of its site."""

    kind: str
    settings: dict[str, Any]
    directory: Path
    shell: Any = None
    """Of the site's own submit host."""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Any]:
        settings = {"default_script": SCRIPT, "keep": "all"} | self.settings
        ce = CEDescription("ce", 100, 1.0)
        if self.shell is None:
            backend = make_backend(self.kind, ce, settings)
        else:
            backend = BatchBackend(ce, BatchSettings.model_validate(settings), self.shell)
        try:
            yield backend
        finally:
            await backend.close()


@pytest.fixture(params=["local", "run_as", "ssh", "slurm", "gridengine", "htcondor", "arc"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    match request.param:
        case "local":
            return Place("local", {"directory": str(tmp_path)}, tmp_path)
        case "run_as":
            if os.geteuid() != 0:
                pytest.skip("needs root")
            for directory in (tmp_path, *tmp_path.parents[:3]):
                directory.chmod(0o711)
            return Place("local", {"directory": str(tmp_path / "ce"), "run_as": "nobody"}, tmp_path)
        case "ssh":
            sshd: Sshd = request.getfixturevalue("sshd")
            return Place("ssh", sshd.settings | {"workdir": str(tmp_path / "ce")}, tmp_path)
        case "slurm":
            slurm: SlurmSite = request.getfixturevalue("slurm_site")
            settings = {"directory": str(tmp_path / "ce"), "slurm_conf": str(slurm.slurm_conf)}
            return Place("slurm", settings, slurm.slurm_conf.parent)
        case "gridengine":
            site: GridEngineSite = request.getfixturevalue("gridengine_site")
            settings = {"directory": str(tmp_path / "ce"), "system": "gridengine"}
            return Place("batch", settings, tmp_path, site)
        case "htcondor":
            pool: HTCondorSite = request.getfixturevalue("htcondor_site")
            where = {"collector": pool.collector, "schedd": pool.schedd, "token": str(pool.token)}
            return Place("htcondor", where | {"timeout_seconds": 60}, pool.directory)
        case _:
            arc: ArcSite = request.getfixturevalue("arc_site")
            where = {"url": arc.url, "certificate": str(arc.certificate), "key": str(arc.key)}
            return Place("arc", where | {"ca": str(arc.ca_file)}, arc.directory)


@contextmanager
def watched(needles: list[bytes]) -> Iterator[list[str]]:
    """Collects the processes with one of these on their command line or, in clear, in their environment."""
    found: list[str] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            for name in ("cmdline", "environ"):
                for path in Path("/proc").glob(f"[0-9]*/{name}"):
                    try:
                        text = path.read_bytes()
                    except OSError:
                        continue
                    # A job's environment is its user's own; there it may be packed, not in clear.
                    sought = needles if name == "cmdline" else needles[:2]
                    found.extend(f"{path}: {text!r:.200}" for needle in sought if needle in text)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def packed(word: str) -> list[bytes]:
    """Base64 of a word within a longer text, wherever it begins there."""
    return [base64.b64encode(b"-" * before + word.encode())[4:-4] for before in range(3)]


def open_to_others(directory: Path, needles: list[bytes]) -> list[str]:
    """Files that hold one of these and that any user who can enter the directory can read."""
    found = []
    for at, names, files in os.walk(directory):
        names[:] = [name for name in names if _mode(Path(at) / name) & stat.S_IXOTH]
        for path in (Path(at) / name for name in files):
            if _mode(path) & stat.S_IROTH and stat.S_ISREG(_mode(path)):
                text = path.read_bytes()
                found.extend(str(path) for needle in needles if needle in text)
    return found


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except OSError:
        return 0


async def test_a_pilot_alone_gets_its_secret(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    words = [secrets.token_urlsafe(32) for _ in range(2)]
    identities = [*(PilotIdentity(URL, word) for word in words), None]
    pilots = [PilotAtCE(uuid.uuid4().hex, "vo", identity=identity) for identity in identities]
    needles = [word.encode() for word in words]
    needles += [each for word in words for each in packed(word)]
    async with place.open() as backend:
        with watched(needles) as seen:
            outcomes = await backend.submit(pilots)
            assert all(outcome.reference for outcome in outcomes.values()), outcomes
            pilots = [pilot._replace(reference=outcomes[pilot.stamp].reference) for pilot in pilots]
            ends = asyncio.gather(*(observe(backend, pilot, *ENDED) for pilot in pilots))
            exposed: set[str] = set()
            while not ends.done():
                exposed |= set(await asyncio.to_thread(open_to_others, place.directory, needles))
                await asyncio.sleep(0.1)
            assert {end.state for end in await ends} == {Observed.DONE}
            outputs = [(await backend.output(pilot)).stdout for pilot in pilots]
        assert (seen, exposed) == ([], set())
        for word, output in zip(words, outputs, strict=False):
            assert "mode 600\n" in output
            assert f"hash {hashlib.sha256(word.encode()).hexdigest()}" in output
            assert f"url {URL}\n" in output
            assert word not in output
        assert "mode" not in outputs[2]
        assert "url none\n" in outputs[2] or place.kind == "ssh"
        assert not [word for word in words if word in f"{caplog.text} {outcomes} {pilots} {backend.warning}"]
        assert not open_to_others(place.directory, needles)


async def test_others_do_not_see_the_secret_in_what_slurm_says_of_a_job(
    slurm_site: SlurmSite, tmp_path: Path
) -> None:
    word = secrets.token_urlsafe(32)
    settings = {"directory": str(tmp_path), "slurm_conf": str(slurm_site.slurm_conf)}
    async with Place("slurm", settings, tmp_path).open() as backend:
        pilot = PilotAtCE(uuid.uuid4().hex, "vo", identity=PilotIdentity(URL, word))
        reference = (await backend.submit([pilot]))[pilot.stamp].reference
        said = slurm_site.command("scontrol", "show", "job", "-dd", str(reference))
        assert pilot.stamp in said
        assert word not in said
        await observe(backend, pilot, *ENDED)
