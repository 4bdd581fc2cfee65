"""Installed distributions that consist of one module and its entry points."""

from __future__ import annotations

__all__ = ["install_distribution"]

from collections.abc import Mapping
from pathlib import Path


def install_distribution(directory: Path, module: str, code: str, entry_points: Mapping[str, str]) -> None:
    """Install the distribution of a module in a directory that is on the path.

    Args:
        entry_points: `name = object` by group; the object is one of the module.
    """
    path = directory.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    name = module.rpartition(".")[2]
    about = directory / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    lines = [f"[{group}]\n{line.replace('= ', f'= {module}:')}\n" for group, line in entry_points.items()]
    (about / "entry_points.txt").write_text("".join(lines))
