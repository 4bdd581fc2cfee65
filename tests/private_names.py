"""Refuses tests that patch private names, and counts those that read them: `make lint` runs it.

What a test has to change is a setting, an argument with a default, or a public name.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
READS_BOUND = 25
"""Reads of private names that are left. Lower it when you remove one."""
PUBLIC = {"_replace", "_asdict", "_fields", "_mapping", "_exit"}
"""Attributes of named tuples, rows and `os` with an underscore."""
PATCHES = {"setattr", "delattr", "patch", "object", "setitem"}


def is_private(name: object) -> bool:
    """Return whether the last part of a name says that it is private."""
    last = name.rpartition(".")[2] if isinstance(name, str) else ""
    return last.startswith("_") and not last.startswith("__") and last not in PUBLIC


def patched(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each private name of other objects that is assigned, or patched by its name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in PATCHES:
            names = [each.value for each in node.args[:2] if isinstance(each, ast.Constant)]
            yield from ((node.lineno, name) for name in names if is_private(name))
        targets = node.targets if isinstance(node, ast.Assign) else ()
        if isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = (node.target,)
        for target in targets:
            if isinstance(target, ast.Attribute) and is_private(target.attr) and not is_own(target.value):
                yield node.lineno, ast.unparse(target)


def is_own(value: ast.expr) -> bool:
    """Return whether it is the object or class itself, whose private names are its own."""
    return ast.unparse(value) in ("self", "cls", "super()")


def own_names(tree: ast.AST) -> set[str]:
    """Names that the file gives to its own functions, classes and attributes."""
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_own(node.value))
    return found | {node.attr for node in attributes}


def read(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each private name of another module or object that is read."""
    own = own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node.value):
            if node.attr not in own:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, each.name) for each in node.names if is_private(each.name))


def main() -> int:
    """Print what is patched, and the number of reads; 1 when there is one patch, or one read more than allowed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    tests = [each for each in listed if "tests/" in each or each == "conftest.py"]
    patches, reads = [], []
    for path in tests:
        if (ROOT / path).exists():
            tree = ast.parse((ROOT / path).read_text())
            patches += [f"{path}:{line}: {name}" for line, name in patched(tree)]
            reads += [f"{path}:{line}: {name}" for line, name in read(tree)]
    if patches:
        print(
            "private names are patched; make each a setting, an argument or a public name:", *patches, sep="\n  "
        )
    if len(reads) > READS_BOUND:
        print(f"private names are read {len(reads)} times, {READS_BOUND} allowed:", *reads, sep="\n  ")
    elif "--lower" in sys.argv:
        print(f"READS_BOUND can be {len(reads)}:", *reads, sep="\n  ")
    print(f"private names in tests: {len(patches)} patched, {len(reads)} read")
    return int(bool(patches) or len(reads) > READS_BOUND)


if __name__ == "__main__":
    sys.exit(main())
