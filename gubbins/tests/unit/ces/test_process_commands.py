"""Commands of the back ends `local` and `ssh`, with any output."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gubbins.ces.processes.commands import command, parse, quote
from gubbins.ces.transports.shell import Completed
from gubbins.domain.exceptions import CEUnavailableError

SHELLS = [shell for shell in ("dash", "bash", "busybox") if shutil.which(shell)]


def run(shell: str, text: bytes, home: Path) -> subprocess.CompletedProcess[bytes]:
    argv = [shell, "sh", "-s"] if shell == "busybox" else [shell, "-s"]
    environment = {"HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin"}
    return subprocess.run(argv, input=text, env=environment, capture_output=True, check=False, timeout=60)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_truncated_command_does_nothing(shell: str, tmp_path: Path) -> None:
    text = command(["mkdir abcdef", "mkdir ghijkl"], "m")
    tail = len(b"mkdir abcdef\nmkdir ghijkl\nsay end\nprintf '\\n'\n} < /dev/null\n")
    for cut in [*range(0, len(text) - tail, 997), *range(len(text) - tail, len(text) - len(b" < /dev/null\n"))]:
        run(shell, text[:cut], tmp_path)
        assert list(tmp_path.iterdir()) == [], text[:cut][-40:]
    run(shell, text, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"abcdef", "ghijkl"}


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_reads_quoted_values_unchanged(shell: str, tmp_path: Path) -> None:
    @settings(deadline=None, max_examples=50)
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
    def check(value: str) -> None:
        text = command([f"value={quote(value)}", "say value", "printf '\\n%s' \"$value\""], "a1b2")
        response = run(shell, text, tmp_path)
        completed = Completed(response.returncode, response.stdout.decode(), response.stderr.decode())
        assert parse(completed, "a1b2", host="h") == [("value", value.replace("\0", ""))]

    check()


@given(st.integers(), st.text(), st.text())
def test_any_response_of_a_host_is_a_result_or_an_error_of_one_line(code: int, out: str, err: str) -> None:
    for text in (out, f"\nm {out}", f"\nm {out}\nm end\n", out.replace("\n", "\nm "), f"\nm failed {out}"):
        message = "h: "
        try:
            parse(Completed(code, text, err), "m", host="h")
        except CEUnavailableError as error:
            message = str(error)
        assert message.startswith("h: ")
        assert "\n" not in message


def test_a_truncated_response_is_refused() -> None:
    with pytest.raises(CEUnavailableError, match="This account is not available"):
        parse(Completed(1, "This account is not available.\n", ""), "m", host="h")
    with pytest.raises(CEUnavailableError):
        parse(Completed(0, "\nm submitted s1\nm submitted s2", ""), "m", host="h")
