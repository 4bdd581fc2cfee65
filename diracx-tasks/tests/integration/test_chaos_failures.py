"""Errors of the chaos driver itself, as distinct from violations."""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ResponseError
from support.paths import ROOT

sys.path.append(str(ROOT))
from chaos import redis_servers
from chaos.__main__ import main


def test_an_error_of_chaos_itself_is_reported_in_one_line_and_not_a_violation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Late ones, too: those of a disturbance come out where its end is waited for, as a group."""

    async def refuses(*_: Any) -> None:
        raise ResponseError("NOGOODSLAVE No suitable replica to promote")

    monkeypatch.setattr(redis_servers.Single, "disturb", refuses)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    options = ["--profile", "server", "--seconds", "8", "--tasks", "200", "--workers", "2", "--schedulers", "1"]
    monkeypatch.setattr(sys, "argv", ["chaos", *options])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert main() == 3
    printed, errors = capsys.readouterr()
    assert printed == "", "nothing is judged"
    [failed] = [line for line in errors.splitlines() if "chaos itself failed" in line]
    assert "ResponseError: NOGOODSLAVE No suitable replica to promote; see " in failed
    assert errors.splitlines()[-1] == failed
    [report] = tmp_path.glob("chaos-*/failure.txt")
    assert "ResponseError" in report.read_text()
