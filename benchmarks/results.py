"""RESULTS.md: a section for each command that measures, which replaces its own and leaves the others."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")


def machine() -> str:
    """Describe the machine in one line."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    system = f"{platform.system()} {platform.release()}"
    return f"{model}, {os.cpu_count()} cores, {system}, Python {platform.python_version()}"


def write_section(name: str, text: str, path: Path = RESULTS) -> None:
    """Replace the section between the markers of `name`, or add it at the end."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n\n{text.strip()}\n\n{end}"
    before = path.read_text() if path.exists() else "# Results\n"
    found = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    after, replaced = found.subn(lambda _: section, before)
    path.write_text(after if replaced else f"{before.rstrip()}\n\n{section}\n")
