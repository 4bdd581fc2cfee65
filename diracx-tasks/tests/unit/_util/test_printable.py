"""Untrusted text in terminals, output and logs."""

from __future__ import annotations

import io
import json
import logging
import unicodedata

import pytest
from diracx.core.logs import JSONFormatter, TextFormatter
from diracx.tasks.cli.output import echo, show
from diracx.tasks.cli.runtime.logs import SafeFormatter
from diracx.tasks.operations.views import Column, View
from diracx.tasks.plumbing._util.printable import printable, printable_line
from hypothesis import given
from hypothesis import strategies as st

NASTY = "a\x1b[31mb\x9b2Jc\u202ed\u2066e\ud800f\x07g\rh\u2028i\x7fj\x00k\u200bl"
anything = st.text(st.characters() | st.characters(categories=["Cs", "Cc", "Cf", "Zl", "Zp"]))


@given(anything)
def test_printable_text_has_no_control_or_formatting_character_and_can_be_encoded(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    assert not [each for each in shown if unicodedata.category(each) in ("Cs", "Zl", "Zp")]
    assert not [each for each in shown if unicodedata.category(each) == "Cc" and each not in "\n\t"]
    assert not [each for each in shown if unicodedata.bidirectional(each) in _BIDIRECTIONAL_CONTROLS]
    assert shown.encode().decode() == shown
    assert len(printable_line(text).splitlines()) <= 1


_BIDIRECTIONAL_CONTROLS = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}


def test_text_of_every_language_does_not_change() -> None:
    for text in ("naïve 🚀 日本語\n\tعربى", "one\xa0two", ""):
        assert printable(text) == text


def test_the_output_of_commands_is_printable_and_markup_in_it_has_no_effect(
    capsys: pytest.CaptureFixture[str],
) -> None:
    echo(f"one {NASTY} [red]x[/red] redis://:pa'ss@host")
    echo(NASTY, err=True)
    view: View[dict[str, str]] = View("nothing", (Column("[bold]name", "name"), Column("value", "value")))
    rows = [{"name": NASTY, "value": "[link=http://x]y[/link] [/]"}, {"name": "two\nlines", "value": "b"}]
    show(view, rows, as_json=False)
    captured = capsys.readouterr()
    assert "[red]x[/red] redis://:***@host" in captured.out
    assert "[link=http://x]y[/link] [/]" in captured.out
    assert "two lines" in captured.out
    for text in (captured.out, captured.err):
        assert text.replace("\n", "").isprintable()


def test_no_logged_text_can_forge_a_record() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(SafeFormatter(TextFormatter(), is_json=False))
    logger = logging.Logger("worker")  # of its own: nothing else is to see it
    logger.addHandler(handler)
    forged = "x\n2026-11-28 12:00:00.000Z INFO     worker: all is well"
    logger.info("ended: %s", forged + NASTY)
    try:
        raise ValueError(forged)
    except ValueError:
        logger.exception("failed\rtask")
    first, *others = stream.getvalue().splitlines()
    assert first.endswith("worker: ended: x")
    records = [line for line in others if not line.startswith("  ")]
    assert [line.rpartition(": ")[2] for line in records] == ["failed�task"]
    assert stream.getvalue().replace("\n", "").isprintable()


@given(anything)
def test_a_json_log_record_is_one_printable_line_without_passwords(text: str) -> None:
    record = logging.LogRecord("worker", logging.INFO, "", 0, "%s redis://u:sesame@host", (text,), None)
    record.__dict__["found"] = {"urls": ["redis://u:sesame@host", text]}
    line = SafeFormatter(JSONFormatter(), is_json=True).format(record)
    assert len(line.splitlines()) == 1
    reported = json.loads(line)
    assert reported["found"]["urls"][0] == "redis://u:***@host"
    for shown in (reported["body"], *reported["found"]["urls"]):
        assert printable(shown) == shown
    assert "sesame" not in line
