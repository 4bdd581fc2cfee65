"""Secrets of pilots: passed in a file, and hidden from other users of a site."""

from __future__ import annotations

__all__ = ["URL", "Place", "assert_only_the_pilot_can_read_its_secret"]

import asyncio
import base64
import hashlib
import logging
import os
import secrets
import stat
import threading
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gubbins.ces import CEDescription, Observed, PilotAtCE, PilotIdentity, make_backend
from gubbins.ces.batch import BatchBackend, BatchSettings
from support.pilot_waiters import ENDED
from support.waiting import until

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
    """Submit host of the site."""
    pilots: int = 2
    """Number of pilots with a secret in one call."""
    pause_seconds: float = 0.05
    """Interval of polls, at least."""

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


@contextmanager
def watched(needles: list[bytes]) -> Iterator[list[str]]:
    """Collects the processes with one of these on their command line or, in clear, in their environment."""
    found: list[str] = []
    over = threading.Event()
    before = newest = _newest_process()
    commands: dict[int, bytes] = {}  # of processes that are new
    looks: Counter[int] = Counter()

    def watch() -> None:
        nonlocal before, newest
        while not over.wait(0.02):
            # What is on the command line of a process stays there: those that were there before get nothing new.
            # Those of the last interval are tried again: a process has its number before it can be found.
            last, before, newest = before, newest, _newest_process()
            new: Iterable[int] = range(last + 1, newest + 1)
            if newest < last:  # the numbers have begun anew
                new = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
            for process in {*commands, *new}:
                look(process)

    def look(process: int) -> None:
        looks[process] += 1
        if looks[process] > 10 and looks[process] % 10:
            return  # most processes start other programs soon, or never
        try:
            command = _read(f"/proc/{process}/cmdline")
            if commands.get(process) == command:
                return
            # A job's environment is its user's own; there it may be packed, not in clear.
            environment = _read(f"/proc/{process}/environ")
        except OSError:  # it has ended
            commands.pop(process, None)
            looks.pop(process)
            return
        commands[process] = command
        found.extend(f"{process}: {command!r:.200}" for needle in needles if needle in command)
        found.extend(f"{process}: {environment!r:.200}" for word in needles[:2] if word in environment)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def _newest_process() -> int:
    return int(_read("/proc/loadavg").split()[-1])


def packed(word: str) -> list[bytes]:
    """Base64 of a word within a longer text, wherever it begins there."""
    return [base64.b64encode(b"-" * before + word.encode())[4:-4] for before in range(3)]


def open_to_others(directory: Path, needles: list[bytes], known: dict[str, int] | None = None) -> list[str]:
    """Files with one of these texts that any user who can enter the directory can read.

    Args:
        known: when each file last changed that has been read; those are not read again.
    """
    found = []
    known = {} if known is None else known
    for at, names, files in os.walk(directory):
        names[:] = [name for name in names if _status(f"{at}/{name}").st_mode & stat.S_IXOTH]
        for path in (f"{at}/{name}" for name in files):
            status = _status(path)
            open_to_all = status.st_mode & stat.S_IROTH and stat.S_ISREG(status.st_mode)
            if open_to_all and known.get(path) != status.st_ctime_ns:
                known[path] = status.st_ctime_ns
                text = _read(path)
                found.extend(path for needle in needles if needle in text)
    return found


_NOTHING = os.stat_result((0,) * 10)


def _status(path: str) -> os.stat_result:
    try:
        return os.lstat(path)
    except OSError:
        return _NOTHING


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


async def assert_only_the_pilot_can_read_its_secret(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Run pilots with and without secrets there, and look for the secrets wherever other users can read."""
    caplog.set_level(logging.DEBUG)
    words = [secrets.token_urlsafe(32) for _ in range(place.pilots)]
    identities = [*(PilotIdentity(URL, word) for word in words), None]
    pilots = [PilotAtCE(uuid.uuid4().hex, "vo", identity=identity) for identity in identities]
    needles = [word.encode() for word in words]
    needles += [each for word in words for each in packed(word)]
    async with place.open() as backend:
        with watched(needles) as seen:
            outcomes = await backend.submit(pilots)
            assert all(outcome.reference for outcome in outcomes.values()), outcomes
            pilots = [pilot._replace(reference=outcomes[pilot.stamp].reference) for pilot in pilots]
            exposed: set[str] = set()
            known: dict[str, int] = {}

            async def all_ended() -> set[Observed] | None:
                exposed.update(await asyncio.to_thread(open_to_others, place.directory, needles, known))
                observed = await backend.poll(pilots)
                states = [each.state for each in observed.values() if each.state in ENDED]
                return set(states) if len(states) == len(pilots) else None

            assert await until(all_ended, "the pilots end", 200, place.pause_seconds) == {Observed.DONE}
            outputs = [(await backend.output(pilot)).stdout for pilot in pilots]
        assert (seen, exposed) == ([], set())
        for word, output in zip(words, outputs, strict=False):
            assert "mode 600\n" in output
            assert f"hash {hashlib.sha256(word.encode()).hexdigest()}" in output
            assert f"url {URL}\n" in output
            assert word not in output
        assert "mode" not in outputs[-1]
        assert "url none\n" in outputs[-1]
        assert not [word for word in words if word in f"{caplog.text} {outcomes} {pilots} {backend.warning}"]
        assert not open_to_others(place.directory, needles)
