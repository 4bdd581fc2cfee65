"""Print an interpreter of each promised Python that this machine has, one a line: from PATH, then from pyenv."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
_CLASSIFIER = "Programming Language :: Python :: 3."
_WHICH = "import sys, ensurepip; print('%d.%d' % sys.version_info[:2])"


def promised() -> list[str]:
    """The versions that the distributions name, as `3.12`; of both the same.

    Raises:
        ValueError: they name different ones.
    """
    named = []
    for distribution in ("diracx-tasks", "gubbins"):
        project = tomllib.loads((ROOT / distribution / "pyproject.toml").read_text())["project"]
        classifiers = [each for each in project.get("classifiers", ()) if each.startswith(_CLASSIFIER)]
        named.append([each.rpartition(" ")[2] for each in classifiers])
    if named[0] != named[1]:
        raise ValueError(f"the distributions promise different versions of Python: {named[0]} and {named[1]}")
    return named[0]


def found() -> dict[str, str]:
    """An interpreter by version, of those that start and can make virtual environments."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    interpreters: dict[str, str] = {}
    for version in promised():
        on_path = shutil.which(f"python{version}")
        candidates = [*([on_path] if on_path else []), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))]
        for candidate in candidates:
            done = subprocess.run([candidate, "-c", _WHICH], check=False, capture_output=True, text=True)
            if done.stdout.strip() == version:
                interpreters[version] = candidate
                break
    return interpreters


if __name__ == "__main__":
    interpreters = found()
    if lacking := [version for version in promised() if version not in interpreters]:
        print(f"not on this machine, so not tested: Python {', '.join(lacking)}", file=sys.stderr)
    print("\n".join(interpreters.values()))
