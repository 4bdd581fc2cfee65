"""The pages for contributors name files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TASKS = ROOT / "diracx-tasks" / "src" / "diracx" / "tasks"
#: Folders to which a name in these pages may be relative.
BASES = (
    *(ROOT, ROOT / "gubbins" / "src", TASKS, TASKS / "plumbing", TASKS / "plumbing" / "worker"),
    *(TASKS / "plumbing" / "broker", TASKS / "web" / "dashboard"),
)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/explanation/architecture.md"])
def test_every_file_that_a_page_for_contributors_names_exists(page: str) -> None:
    tests = {path.name for folder in ("diracx-tasks", "gubbins") for path in (ROOT / folder).glob("tests/**/*.py")}
    named = re.findall(r"`([\w./-]+)`", (ROOT / page).read_text())
    files = [
        name for name in named if "NAME" not in name and not name.startswith("/") and re.search(r"/|\.py$", name)
    ]
    assert len(files) > 10
    assert [
        name for name in files if name not in tests and not any((base / name).exists() for base in BASES)
    ] == []
