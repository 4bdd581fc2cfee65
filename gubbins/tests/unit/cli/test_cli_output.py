"""Untrusted text in the output of `gubbins`."""

from __future__ import annotations

import sys

import pytest
from diracx.tasks.cli.errors import CliError
from diracx.tasks.cli.options import command_group
from diracx.tasks.cli.output import echo, print_json
from diracx.tasks.cli.program import run_program

from gubbins.cli.session import print_table

NASTY = "a\x1b]0;x\x07\x1b[31m\x9b2J\u202e\ud800\rb\nFORGED [red]c[/red] [/] [link=http://x]d[/link]"


def test_printed_text_is_printable_and_without_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    print_table(f"of {NASTY}", ("name", "last error"), [(NASTY, 1), (NASTY, None)])
    captured = capsys.readouterr().out
    assert "[red]c[/red] [/]" in captured
    assert not [line for line in captured.splitlines() if line.startswith("FORGED")]
    echo(NASTY)
    print_json({"name": NASTY})
    failing = command_group("gubbins", "")

    @failing.command()
    def fail() -> None:
        raise CliError(NASTY)

    monkeypatch.setattr(sys, "argv", ["gubbins", "fail"])
    with pytest.raises(SystemExit, match="1"):
        run_program(lambda: failing, "gubbins")
    more = capsys.readouterr()
    for text in (captured, more.out, more.err):
        assert text.replace("\n", "").isprintable()
