"""The pages for contributors name files that exist."""

from __future__ import annotations

import ast
import re

import pytest
from support.order_of_files import LONGEST
from support.paths import ROOT

TASKS = ROOT / "diracx-tasks" / "src" / "diracx" / "tasks"
#: Folders to which a name in these pages may be relative.
BASES = (
    *(ROOT, ROOT / "gubbins" / "src", TASKS, TASKS / "plumbing", TASKS / "plumbing" / "worker"),
    *(TASKS / "plumbing" / "broker", TASKS / "web" / "dashboard"),
)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/explanation/architecture.md"])
def test_every_file_that_a_page_for_contributors_names_exists(page: str) -> None:
    tests = [str(path) for folder in ("diracx-tasks", "gubbins") for path in (ROOT / folder).glob("tests/**/*")]
    named = re.findall(r"`([\w./-]+)`", (ROOT / page).read_text())
    files = [
        name for name in named if "NAME" not in name and not name.startswith("/") and re.search(r"/|\.py$", name)
    ]
    assert len(files) > 10
    assert [
        name
        for name in files
        if not any(path.endswith(f"/{name}") for path in tests)
        and not any((base / name).exists() for base in BASES)
    ] == []


def test_every_file_of_tests_that_begins_first_exists() -> None:
    assert [name for name in LONGEST if not list(ROOT.glob(f"*/tests/**/{name}"))] == []


def test_every_step_of_the_walk_names_a_function_that_exists() -> None:
    page = (ROOT / "docs" / "explanation" / "architecture.md").read_text()
    steps = re.findall(r"\[`([\w.]+)`\]\([\w./-]+/diracx/tasks/(plumbing/[\w/]+\.py)\)", page)
    steps = [(name, file) for name, file in steps if not name.endswith(".py")]
    assert len(steps) > 10
    for name, file in steps:
        body = ast.parse((TASKS / file).read_text()).body
        for part in name.split("."):
            found = [node for node in body if getattr(node, "name", None) == part]
            assert found, f"{file} has no {name}"
            body = getattr(found[0], "body", [])


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "docs/index.md", "docs/adr/index.md", "docs/tutorial", "docs/how-to"]
)
def test_the_glossary_is_linked_from_every_section(page: str) -> None:
    path = ROOT / page
    pages = sorted(path.glob("*.md")) if path.is_dir() else [path]
    assert pages
    assert [each.name for each in pages if "reference/glossary.md" not in each.read_text()] == []


def test_every_decision_is_in_the_index_by_number_and_title_and_has_the_three_parts() -> None:
    folder = ROOT / "docs" / "adr"
    index = (folder / "index.md").read_text()
    records = sorted(folder.glob("0*.md"))
    assert len(records) > 90
    for record in records:
        text = record.read_text()
        number, _, title = text.partition("\n")[0].removeprefix("# ").partition(". ")
        assert int(number) == int(record.name[:4])
        assert f"| [{number}]({record.name}) | {title}" in index
        parts = ("Situation", "Decision", "Consequences")
        assert "Superseded by" in text or all(f"**{part}" in text for part in parts), record.name
