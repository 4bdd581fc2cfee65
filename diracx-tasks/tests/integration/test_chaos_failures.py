"""Failures of the chaos driver itself, told from findings."""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ResponseError

sys.path.append(str(Path(__file__).parents[3]))
from chaos import redis_servers
from chaos.__main__ import main


def test_a_failure_of_chaos_itself_is_one_line_and_no_finding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Late ones, too: those of a disturbance come out where its end is waited for, as a group."""

    async def refuses(*_: Any) -> None:
        raise ResponseError("NOGOODSLAVE No suitable replica to promote")

    monkeypatch.setattr(redis_servers.Single, "_disturb", refuses)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    storm = ["--profile", "server", "--seconds", "8", "--tasks", "200", "--workers", "2", "--schedulers", "1"]
    monkeypatch.setattr(sys, "argv", ["chaos", *storm])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert main() == 3
    printed, told = capsys.readouterr()
    assert printed == "", "nothing is judged"
    [failed] = [line for line in told.splitlines() if "chaos itself failed" in line]
    assert "ResponseError: NOGOODSLAVE No suitable replica to promote; see " in failed
    assert told.splitlines()[-1] == failed
    [report] = tmp_path.glob("chaos-*/failure.txt")
    assert "ResponseError" in report.read_text()
