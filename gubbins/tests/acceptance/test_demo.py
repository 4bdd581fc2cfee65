"""The demo: real processes, the real API, and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
from support.paths import ROOT
from support.waiting import eventually

COMMAND = [sys.executable, "-m", "examples.demo", "--json"]


def processes_of(directory: str) -> list[int]:
    """Processes whose environment or command line names the demo's directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if directory.encode() in words:
                found.append(int(entry.name))
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:  # it has just ended
        return ""


def _look_at_the_dashboard(link: str) -> None:
    with httpx.Client(follow_redirects=True, timeout=30) as browser:
        page = browser.get(link)
        assert page.status_code == 200, page.text
        pilots = browser.get(page.url.join("/pilots"))
    assert "reliable.example.org" in pilots.text


def _find_pilots_with_jobs(url: str, token: str) -> None:
    """In DiracX's own registry; and our pilots know the jobs that ran on them."""
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=30) as client:
        deadline = time.monotonic() + 60
        while True:
            found = client.post("/api/pilots/search", json={})
            assert found.status_code in {200, 206}, found.text
            running = client.get("/api/my_pilots/pilots?status=DONE&per_page=50").json()["items"]
            jobs = [
                client.get(f"/api/my_pilots/pilots/{pilot['pilot_id']}").json()["jobs"] for pilot in running[:5]
            ]
            if any(jobs) and found.json():
                break
            assert time.monotonic() < deadline, (found.text, jobs)
            time.sleep(0.5)
    assert {"PilotStamp", "Status", "VO"} <= found.json()[0].keys()


def test_demo_fills_the_compute_elements_and_ends_with_ctrl_c() -> None:
    demo = subprocess.Popen(COMMAND, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert demo.stderr is not None
    reported: list[str] = []
    reader = threading.Thread(target=lambda: reported.extend(iter(demo.stderr.readline, "")), daemon=True)
    reader.start()

    def wait_for(pattern: str, seconds: float) -> re.Match[str]:
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, "".join(reported))):
            assert demo.poll() is None, "".join(reported)
            assert time.monotonic() < deadline, "".join(reported)
            time.sleep(0.05)
        return found

    try:
        wait_for(r"[1-9]\d* RUNNING", 60)
        directory = wait_for(r"logs: (\S+)", 60)[1]
        url = wait_for(r"(http://127\.0\.0\.1:\d+)/api/my_pilots/summary", 60)[1]
        token = wait_for(r"TOKEN=(\S+)", 60)[1]
        deadline = time.monotonic() + 60
        while True:
            try:
                response = httpx.get(
                    f"{url}/api/my_pilots/summary", headers={"Authorization": f"Bearer {token}"}, timeout=10
                )
                if response.status_code != 503:
                    break
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, "the API does not come up"
            time.sleep(0.1)
        assert response.status_code == 200, response.text
        assert "lhcb" in response.text
        assert httpx.get(f"{url}/api/my_pilots/summary", timeout=10).status_code == 401
        wait_for(r"[1-9]\d* DONE", 60)
        wait_for(r"pilots say: .*no work", 60)
        wait_for(r"pilots say: .*worked", 60)
        _look_at_the_dashboard(wait_for(r"dashboard: (\S+)", 1)[1])
        _find_pilots_with_jobs(url, token)
        # A child that it has only just forked has its command line, too.
        worker = min(pid for pid in processes_of(directory) if "--worker-size medium" in command_line(pid))
        os.kill(worker, signal.SIGKILL)
        wait_for(r"worker-1 was started again", 60)
        demo.send_signal(signal.SIGINT)
        output, _ = demo.communicate(timeout=40)
    finally:
        demo.kill()
    assert demo.returncode == 0, "".join(reported)
    report = json.loads(output.splitlines()[-1])
    assert set(report["pilots"]) == {"cta", "juno", "lhcb"}
    assert all(set(states) == {"SUBMITTED", "RUNNING", "DONE", "FAILED"} for states in report["pilots"].values())
    for ce in report["ces"].values():
        assert 0 < ce["max_active_seen"] <= ce["capacity"]
    assert report["illegal_transitions"] == 0
    assert report["outcomes"]["worked"] > 0
    assert report["restarts"] == {"worker-1": 1}
    assert all(report["waiting_jobs"][vo] > 0 for vo in ("cta", "juno", "lhcb"))
    assert not Path(directory).exists()
    eventually(lambda: not processes_of(directory), "none of its processes runs", 10)
