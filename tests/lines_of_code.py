"""Count the lines of the two distributions and of files of tests; refuse more than the bounds.

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
    """Fails above it. It is 1 to 2 % above the count, so that a change of words needs no change here.

    Lower it when you delete code; raise it for a capability, with the reason in the commit.
    """
    goal: int


BOUNDS = (
    Bound("diracx-tasks/src", 35_300, 21_000),
    Bound("diracx-tasks/src/diracx/tasks/cli", 3_940, 3_200),
    Bound("gubbins/src", 15_650, 11_000),
)


TESTS = ("diracx-tasks/tests", "gubbins/tests", "tests", "docs/examples")
LONGEST_TEST = 500
"""Lines of a file of tests; one that is longer is to be split by what it promises."""


def lines_of_files(*folders: str) -> dict[str, int]:
    """Lines of each file of Python and Lua below some folders."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *folders]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    ours = [name for name in names if name.endswith((".py", ".lua")) and "/vendor/" not in name]
    return {name: len((ROOT / name).read_bytes().splitlines()) for name in ours if (ROOT / name).exists()}


def lines_in(folder: str) -> int:
    """Lines of Python and Lua below a folder."""
    return sum(lines_of_files(folder).values())


def main() -> int:
    """Print the table; 1 when a folder has more lines than its bound, or a file of tests too many."""
    counted = [(bound, lines_in(bound.folder)) for bound in BOUNDS]
    print(f"{'lines of code':34} {'now':>7} {'bound':>7} {'goal':>7}")
    for bound, lines in counted:
        verdict = "  TOO MANY: delete what you can before you raise the bound" if lines > bound.bound else ""
        print(f"{bound.folder:34} {lines:7,} {bound.bound:7,} {bound.goal:7,}{verdict}")
    too_long = {name: lines for name, lines in lines_of_files(*TESTS).items() if lines > LONGEST_TEST}
    for name, lines in too_long.items():
        print(f"{name}: {lines} lines, {LONGEST_TEST} allowed: split it by what it promises")
    return int(bool(too_long) or any(lines > bound.bound for bound, lines in counted))


if __name__ == "__main__":
    sys.exit(main())
