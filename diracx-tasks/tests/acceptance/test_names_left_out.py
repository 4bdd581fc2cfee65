"""Every name that the published package 0.7.0 defines is here, or listed in the page on migration."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator

import pytest

from benchmarks.peers.environments import ROOT, is_ready, prepare

_PAGE = ROOT / "docs/how-to/move-from-the-published-package.md"


def defined(tree: ast.Module | ast.ClassDef, of: str = "") -> Iterator[str]:
    """Public names of a module, as `name` or `Class.name`."""
    for each in tree.body:
        match each:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield of + name
            case ast.ClassDef(name=name):
                yield of + name
                yield from defined(each, f"{name}.")
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                yield of + name


def is_there(module: str, name: str) -> bool:
    """True if ours has it, also a field that only instances have."""
    try:
        found: object = importlib.import_module(module)
    except ImportError:
        return False
    for part in name.split("."):
        fields = {**getattr(found, "__dataclass_fields__", {}), **getattr(found, "model_fields", {})}
        if part not in fields and part not in getattr(found, "__annotations__", {}) and not hasattr(found, part):
            return False
        found = getattr(found, part, None)
    return True


def test_every_published_name_is_there_or_is_listed_with_its_reason() -> None:
    if not is_ready("reference"):
        pytest.skip("the published package is not installed (`make servers` does it)")
    text = re.sub(r"```.*?```", "", _PAGE.read_text(), flags=re.DOTALL)
    listed = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`]+`", text))))
    [packages] = prepare("reference").glob("lib/python*/site-packages")
    missing: list[str] = []
    left_out: set[str] = set()
    for path in sorted((packages / "diracx/tasks").rglob("*.py")):
        module = ".".join(path.relative_to(packages).with_suffix("").parts).removesuffix(".__init__")
        for name in defined(ast.parse(path.read_text())):
            last = name.rpartition(".")[2]
            # Names of types, loggers and type variables are nothing that others use.
            if last.startswith("_") or last in ("T", "logger", "model_config") or "_types" in module:
                continue
            owner = f"{module}.{name}".rpartition(".")[0]
            if not is_there(module, name):
                left_out.add(f"{module}.{name}")
                if last not in listed and owner not in left_out:
                    missing.append(f"{module}.{name}")
    assert missing == []
