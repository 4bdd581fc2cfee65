"""The header `Retry-After` of a site delays the next call, with a real HTTPS server that responds for A-REX."""

from __future__ import annotations

import json
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.moving_clock import Clock

from gubbins.db.sql import MyPilotDB
from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.exceptions import CEPausedError, CERefusedError
from gubbins.logic import my_pilots as logic

JOB = {"status-code": "201", "reason": "Created", "id": "job1", "state": "QUEUING"}


class Arex(ThreadingHTTPServer):
    """Responds to each request with a job, or with `refusal`: a status and the value of `Retry-After`."""

    refusal: tuple[int, str] | None = None
    requests = 0


class Handler(BaseHTTPRequestHandler):
    server: Arex

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests += 1
        code, retry_after = self.server.refusal or (201, None)
        body = json.dumps({"job": [JOB]}).encode()
        self.send_response(code)
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tls") / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", file, "-out", file.with_suffix(".ca")], check=True, capture_output=True)
    file.write_bytes(file.read_bytes() + file.with_suffix(".ca").read_bytes())
    return file


@pytest.fixture
async def arex(sqlite_db: MyPilotDB, certificate: Path) -> Any:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with Arex(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        token = certificate.with_suffix(".token")
        token.write_text("token")
        settings = {
            "url": f"https://localhost:{server.server_port}/arex",
            "token": str(token),
            "ca": str(certificate),
            "default_script": "true",
            "list_again_seconds": 0,
        }
        rules = {"breaker_failures": 9, "breaker_max_pause_seconds": 900, "max_batch": 1}
        await sqlite_db.add_ce("ce", 10, 1.0, backend="arc", settings=settings, rules=rules)
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def at() -> Iterator[Clock]:
    with clock.simulated(moving := Clock()):
        yield moving


async def pause(db: MyPilotDB, call: CECall, at: Clock) -> float:
    """Seconds until the end of the pause of these calls; 0: there is none."""
    until = (await db.get_ce("ce"))["circuits"][call]["open_until"]
    return 0 if until is None else (until - at()).total_seconds()


@pytest.mark.parametrize(
    ("code", "value", "seconds"),
    [
        (429, "120", 120),
        (503, "120", 120),
        (503, "in 10 minutes", pytest.approx(600, abs=60)),
        (503, "9" * 5_000, 900),
        (503, "Fri, 31 Dec 9999 23:59:59 GMT", 900),
        (503, "Thu, 01 Jan 1970 00:00:00 GMT", 0),
        (503, "Thu, 99 Jan 99999999999999999999 00:00:00 GMT", 0),
        (503, "0", 0),
        (503, "-5", 0),
        (503, "1e9", 0),
        (503, "soon \xb2", 0),
        (500, "120", 120),
    ],
)
async def test_submissions_pause_as_long_as_the_site_asks_for_up_to_the_longest_pause(
    sqlite_db: MyPilotDB, arex: Arex, at: Clock, code: int, value: str, seconds: float
) -> None:
    if value == "in 10 minutes":
        value = formatdate(time.time() + 600, usegmt=True)
    arex.refusal = code, value
    with pytest.raises(CERefusedError, match=str(code)):
        await logic.submit_pilot(sqlite_db, "ce", "lhcb")
    assert await pause(sqlite_db, CECall.SUBMIT, at) == seconds
    # A response 429 means that the request was not executed.
    assert (await sqlite_db.get_ce("ce"))["active"] == (0 if code == 429 else 1)


async def test_no_request_is_made_during_the_pause_and_pilots_are_submitted_after_it(
    sqlite_db: MyPilotDB, arex: Arex, at: Clock
) -> None:
    arex.refusal = 429, "120"
    stamp = (await logic.request_pilots(sqlite_db, "lhcb", vos=["lhcb"]))["ce"][0]
    with pytest.raises(CERefusedError, match="429"):
        await logic.submit_requested_pilot(sqlite_db, "ce", "lhcb", stamp=stamp)
    arex.refusal = None
    for _ in range(2):
        at.at += timedelta(seconds=59)
        with pytest.raises(CEPausedError, match="the last submission failed, no more until 00:02:00 UTC"):
            await logic.submit_pilot(sqlite_db, "ce", "lhcb")
    assert arex.requests == 1
    at.at += timedelta(seconds=2)
    await logic.submit_pilot(sqlite_db, "ce", "lhcb")
    assert await pause(sqlite_db, CECall.SUBMIT, at) == 0


async def test_polls_pause_and_no_pilot_changes_its_state(sqlite_db: MyPilotDB, arex: Arex, at: Clock) -> None:
    pilot_id = await logic.submit_pilot(sqlite_db, "ce", "lhcb")
    arex.refusal = 503, "300"
    await logic.transition_pilot_states(sqlite_db, "lhcb")
    assert await pause(sqlite_db, CECall.STATUS, at) == 300
    at.at += timedelta(seconds=299)
    await logic.transition_pilot_states(sqlite_db, "lhcb")
    assert arex.requests == 2
    assert (await logic.get_pilot(sqlite_db, pilot_id))["status"] == "SUBMITTED"
    arex.refusal = None
    at.at += timedelta(seconds=2)
    await logic.transition_pilot_states(sqlite_db, "lhcb")
    assert await pause(sqlite_db, CECall.STATUS, at) == 0
