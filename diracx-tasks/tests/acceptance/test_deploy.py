"""Alert rules and the Grafana dashboard are valid, and use existing metrics and labels."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.paths import ROOT
from support.promql import PromQLError, read

DEPLOY = ROOT / "deploy"
ALERTS = DEPLOY / "prometheus/alerts.yml"
_SOURCES = (
    "diracx-tasks/src/diracx/tasks/operations/metrics.py",
    "diracx-tasks/src/diracx/tasks/operations/collectors.py",
    "gubbins/src/gubbins/metrics.py",
)


def served_metrics() -> set[str]:
    """Every metric in the sources."""
    text = "".join((ROOT / source).read_text() for source in _SOURCES)
    names = set(re.findall(r'(?:counter|gauge|histogram|of_ces)\(\s*"([a-z_]+)"', text))
    return names | set(re.findall(r'^ +\("([a-z_]+)", "', text, re.MULTILINE))


def documented() -> tuple[set[str], set[str]]:
    """Metrics, and labels, of the reference."""
    rows = [
        row.split("|") for row in (ROOT / "docs/reference/metrics.md").read_text().splitlines() if row[:3] == "| `"
    ]
    names = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row[1])}
    labels = {label for row in rows for cell in row[2:] for label in re.findall(r"`([a-z_]+)`", cell)}
    return names, labels | {"task_name", "priority", "size"}


def panels() -> list[dict[str, Any]]:
    board = json.loads((DEPLOY / "grafana/diracx-tasks.json").read_text())
    return list(board["panels"])


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def check(expression: str) -> None:
    """Check that the expression is valid and uses existing metrics."""
    names, labels = documented()
    names |= {f"{name}_{part}" for name in names for part in ("bucket", "count", "sum")}
    parsed = read(expression)
    assert parsed.metrics, expression
    assert parsed.metrics <= names, expression
    assert parsed.labels <= labels | {"le"}, expression


def test_every_metric_that_is_served_is_in_the_reference_and_the_other_way_round() -> None:
    served = served_metrics()
    assert len(served) > 30
    assert served == documented()[0]


def test_every_alert_is_documented_with_a_remedy() -> None:
    text = (DEPLOY.parent / "docs/how-to/watch.md").read_text()
    assert [rule["alert"] for rule in rules() if f"`{rule['alert']}`" not in text] == []


def test_alert_rules_are_valid_and_use_existing_metrics_and_labels() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) > 6
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert {"summary", "description"} == set(rule["annotations"])
        check(rule["expr"])


def test_the_grafana_dashboard_is_valid_and_uses_existing_metrics_and_labels() -> None:
    identities = [panel["id"] for panel in panels()]
    assert len(identities) == len(set(identities)) > 20
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (place["x"] + column, place["y"] + row) for column in range(place["w"]) for row in range(place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel["targets"]:
            check(target["expr"])


@pytest.mark.parametrize(
    "wrong",
    [
        "sum by (size (pilots)",
        "sum(pilots) by",
        "rate(tasks_failed_total)",
        "guess(pilots)",
        'pilots{ce="a}',
        "pilots > ",
        "max(pilots[5m]",
        "pilots pilots",
    ],
)
def test_an_invalid_promql_expression_is_refused(wrong: str) -> None:
    with pytest.raises(PromQLError):
        read(wrong)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed: `make servers`")
def test_promtool_accepts_the_alert_rules_and_the_expressions_of_the_dashboard(tmp_path: Path) -> None:
    expressions = [target["expr"] for panel in panels() for target in panel["targets"]]
    recorded = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "5m")}
        for number, expression in enumerate(expressions)
    ]
    board = tmp_path / "board.yml"
    board.write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": recorded}]}))
    for path in (ALERTS, board):
        checked = subprocess.run(
            ["promtool", "check", "rules", str(path)], capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr
