"""Source of a configuration, with lines, and reports of its problems."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, NamedTuple

from .merge import Path

if TYPE_CHECKING:
    from yaml.nodes import Node

_MERGE_TAG = "tag:yaml.org,2002:merge"


class Problem(NamedTuple):
    """Problem of a configuration."""

    path: Path
    message: str
    maybe_elsewhere: bool = False
    """It is an unknown name, which may be known on hosts with other extensions."""


@dataclass(frozen=True)
class Source:
    """A file or a section. All sources compare equal, so that equal configurations do."""

    name: str = field(default="", compare=False)
    """Path of a file, or `Systems.Tasks`; empty for a configuration made by code."""
    root: Node | None = field(default=None, compare=False, repr=False)
    """Root node of the YAML file."""

    def line(self, path: Path) -> int | None:
        """Return the line of the path, or of its longest existing prefix; None if lines are unknown."""
        node, line = self.root, None
        for part in path:
            found = _entry(node, part)
            if found is None:
                break
            line, node = found
        return line

    def below(self, part: str) -> Source:
        """Return the source of the section below a key."""
        found = _entry(self.root, part)
        return Source(self.name, None if found is None else found[1])

    def at(self, path: Path) -> str:
        """Return `file:line` of a path, or the name alone."""
        line = self.line(path)
        return self.name if line is None else f"{self.name}:{line}"

    def report(self, problems: Iterable[Problem]) -> list[str]:
        """Format problems as `file:line: dotted.path: message`, sorted by line, without duplicates."""
        by_line = sorted(problems, key=lambda problem: self.line(problem.path) or 0)
        return list(dict.fromkeys(map(self._report, by_line)))

    def _report(self, problem: Problem) -> str:
        where = ".".join(problem.path) or "the top level"
        at = self.at(problem.path)
        return f"{at}: {where}: {problem.message}" if at else f"{where}: {problem.message}"

    def duplicates(self) -> Iterator[Path]:
        """Yield duplicate keys of mappings, of which YAML silently keeps the last."""
        waiting: list[tuple[Path, Node | None]] = [((), self.root)]
        seen: set[int] = set()
        while waiting:
            path, node = waiting.pop()
            if node is None or id(node) in seen:
                continue
            seen.add(id(node))
            known = set()
            for key, value in _pairs(node):
                if isinstance(key.value, str) and key.value in known:
                    yield (*path, str(key.value))
                if isinstance(key.value, str):
                    known.add(key.value)
                waiting.append(((*path, str(key.value)), value))


def _pairs(node: Node | None) -> list[tuple[Node, Node]]:
    from yaml.nodes import MappingNode

    return node.value if isinstance(node, MappingNode) else []


def _entry(node: Node | None, part: str) -> tuple[int, Node] | None:
    """Return line and value of a key of a mapping, or of an index of a list."""
    from yaml.nodes import SequenceNode

    if isinstance(node, SequenceNode) and part.isdecimal() and int(part) < len(node.value):
        item = node.value[int(part)]
        return item.start_mark.line + 1, item
    for key, value in reversed(_pairs(node)):
        if key.value in (part, part.replace("_", "-")):
            return key.start_mark.line + 1, value
    for key, value in _pairs(node):
        if key.tag == _MERGE_TAG:
            for merged in [value] if _pairs(value) else value.value:
                if _pairs(merged) and (found := _entry(merged, part)):
                    return found
    return None


def nearest(name: str, valid: Iterable[str]) -> str:
    """Format a hint to the most similar valid name, or to all of them if few."""
    names = sorted(valid)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {', '.join(names)})" if names and len(names) <= 10 else ""
