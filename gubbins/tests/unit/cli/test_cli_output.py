"""Text of sites and users cannot control the terminal of an operator of `gubbins`."""

from __future__ import annotations

import json
import sys

import pytest
from diracx.tasks.cli.errors import CliError
from diracx.tasks.cli.options import command_group
from diracx.tasks.cli.output import echo
from diracx.tasks.cli.program import run_program

from gubbins.cli.session import emit, table

NASTY = "a\x1b]0;x\x07\x1b[31m\x9b2J\u202e\ud800\rb\nFORGED [red]c[/red] [/] [link=http://x]d[/link]"


def test_everything_printed_for_people_is_printable_and_no_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table(f"of {NASTY}", ("name", "last error"), [(NASTY, 1), (NASTY, None)])
    told = capsys.readouterr().out
    assert "[red]c[/red] [/]" in told
    assert not [line for line in told.splitlines() if line.startswith("FORGED")]
    echo(NASTY)
    failing = command_group("gubbins", "")

    @failing.command()
    def fail() -> None:
        raise CliError(NASTY)

    monkeypatch.setattr(sys, "argv", ["gubbins", "fail"])
    with pytest.raises(SystemExit, match="1"):
        run_program(failing, "gubbins")
    more = capsys.readouterr()
    for text in (told, more.out, more.err):
        assert text.replace("\n", "").isprintable()


def test_json_keeps_every_character(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"name": NASTY})
    told = capsys.readouterr().out
    assert told.replace("\n", "").isprintable()
    assert json.loads(told) == {"name": NASTY}
