"""Templates show missing values by a dash, and leave the values of form fields as they are."""

from __future__ import annotations

import pytest
from diracx.tasks.operations.formats import number
from diracx.tasks.web.dashboard.rendering import environment


def test_a_missing_figure_is_shown_as_a_dash() -> None:
    template = environment().from_string(
        "{{ none|number }} {{ none|bytes }} {{ none|percent }} {{ none|seconds }}"
    )
    assert template.render() == "\u2013 \u2013 \u2013 \u2013"


def test_a_form_sends_back_a_value_that_looks_like_a_missing_one() -> None:
    template = environment().from_string('<input type="hidden" value="{{ reason }}">')
    assert template.render(reason="-") == '<input type="hidden" value="-">'


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0"), (0.0, "0.00"), (0.0034, "0.003"), (0.25, "0.25"), (12345.6, "12,346"), (7, "7")],
)
def test_a_rate_of_some_tasks_per_hour_is_not_shown_as_none(value: float | None, text: str) -> None:
    assert number(value) == text
