"""Count the lines of the two distributions and refuse more than the bounds, which only go down.

`make lint` runs it: Python and Lua that git knows of, nothing vendored, empty lines and comments included.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Bound(NamedTuple):
    """Upper bound of the lines of a folder."""

    folder: str
    bound: int
    """Fails above it. Whoever deletes lines lowers it."""
    goal: int


BOUNDS = (
    Bound("diracx-tasks/src", 36_123, 21_000),
    Bound("diracx-tasks/src/diracx/tasks/cli", 4_605, 3_200),
    Bound("gubbins/src", 16_589, 11_000),
)


def lines_in(folder: str) -> int:
    """Lines of Python and Lua below a folder."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", folder]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    paths = [ROOT / name for name in names if name.endswith((".py", ".lua")) and "/vendor/" not in name]
    return sum(len(path.read_bytes().splitlines()) for path in paths if path.exists())


def main() -> int:
    """Print the table; 1 when a folder has more lines than its bound."""
    counted = [(bound, lines_in(bound.folder)) for bound in BOUNDS]
    print(f"{'lines of code':34} {'now':>7} {'bound':>7} {'goal':>7}")
    for bound, lines in counted:
        verdict = "  TOO MANY: delete what you can before you raise the bound" if lines > bound.bound else ""
        print(f"{bound.folder:34} {lines:7,} {bound.bound:7,} {bound.goal:7,}{verdict}")
    return int(any(lines > bound.bound for bound, lines in counted))


if __name__ == "__main__":
    sys.exit(main())
