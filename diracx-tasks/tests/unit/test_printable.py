"""Text from outside neither steers a terminal nor forges lines of output or of a log."""

from __future__ import annotations

import io
import json
import logging
import unicodedata

import pytest
from diracx.core.logs import JSONFormatter, TextFormatter
from diracx.tasks.cli.output import echo, show
from diracx.tasks.cli.runtime.logs import _Safe
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


def test_words_of_every_language_stay_as_they_are() -> None:
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
    told = capsys.readouterr()
    assert "[red]x[/red] redis://:***@host" in told.out
    assert "[link=http://x]y[/link] [/]" in told.out
    assert "two lines" in told.out
    for text in (told.out, told.err):
        assert text.replace("\n", "").isprintable()


def test_nothing_that_is_logged_can_pass_for_a_record_of_its_own() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Safe(TextFormatter(), is_json=False))
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
def test_a_json_record_is_one_line_whose_texts_are_printable_and_have_no_password(text: str) -> None:
    record = logging.LogRecord("worker", logging.INFO, "", 0, "%s redis://u:sesame@host", (text,), None)
    record.__dict__["found"] = {"urls": ["redis://u:sesame@host", text]}
    line = _Safe(JSONFormatter(), is_json=True).format(record)
    assert len(line.splitlines()) == 1
    told = json.loads(line)
    assert told["found"]["urls"][0] == "redis://u:***@host"
    for shown in (told["body"], *told["found"]["urls"]):
        assert printable(shown) == shown
    assert "sesame" not in line
