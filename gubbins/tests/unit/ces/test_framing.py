"""Framing of remote commands, with any output."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gubbins.ces.transports.framing import extract_response, frame_command
from gubbins.ces.transports.shell import Completed
from gubbins.domain.exceptions import CEUnavailableError

SHELLS = [shell for shell in ("dash", "bash", "busybox") if shutil.which(shell)]


def run(shell: str, text: bytes, directory: Path) -> Completed:
    argv = [shell, "sh", "-s"] if shell == "busybox" else [shell, "-s"]
    done = subprocess.run(argv, input=text, cwd=directory, capture_output=True, check=False, timeout=60)
    return Completed(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.mark.parametrize("shell", SHELLS)
def test_a_truncated_command_does_nothing(shell: str, tmp_path: Path) -> None:
    text = frame_command(["touch", "a b"], b"input\n", {"A": "1"}, "mark")
    for cut in range(len(text) - 2):
        run(shell, text[:cut], tmp_path)
        assert list(tmp_path.iterdir()) == [], text[:cut][-40:]
    run(shell, text, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a b"]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("data", [b"", b"x", b"a\nmar\n$x `id` \\\n"])
def test_every_shell_passes_input_output_and_exit_code(shell: str, data: bytes, tmp_path: Path) -> None:
    argv = ["/bin/sh", "-c", 'cat; printf "%s" "$A"; echo no >&2; exit 7']
    done = extract_response(
        run(shell, frame_command(argv, data, {"A": "it's\n!"}, "mark"), tmp_path), "mark", host="h"
    )
    whole = data.decode() if data.endswith(b"\n") or not data else data.decode() + "\n"
    assert done == (7, f"{whole}it's\n!", "no\n")


@given(st.integers(), st.text(), st.text())
def test_any_output_of_a_host_is_a_response_or_an_error_of_one_line(code: int, out: str, err: str) -> None:
    for text in (out, f"{out}\nm\n{out}", f"{out}\nm\n{out}\nm 3\n", out.replace("\n", "\nm\n")):
        message = "h: "
        try:
            extract_response(Completed(code, text, err), "m", host="h")
        except CEUnavailableError as error:
            message = str(error)
        assert message.startswith("h: ")
        assert "\n" not in message
