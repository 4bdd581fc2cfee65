"""Source of a configuration, down to the line, and the report of a problem with it."""

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
    """It is a name that nothing goes by here, and may be known elsewhere: where other extensions are installed."""


@dataclass(frozen=True)
class Source:
    """A file or a section. All are equal: two configurations are, when they say the same in two places."""

    name: str = field(default="", compare=False)
    """The path of a file, or `Systems.Tasks`; empty for what code has made."""
    root: Node | None = field(default=None, compare=False, repr=False)
    """Root node of the YAML file."""

    def line(self, path: Path) -> int | None:
        """The line where the path is written, or as much of it as is; None where there are no lines."""
        node, line = self.root, None
        for part in path:
            found = _entry(node, part)
            if found is None:
                break
            line, node = found
        return line

    def below(self, part: str) -> Source:
        """Source of the part below a key."""
        found = _entry(self.root, part)
        return Source(self.name, None if found is None else found[1])

    def at(self, path: Path) -> str:
        """`file:line`, or what is known of it."""
        line = self.line(path)
        return self.name if line is None else f"{self.name}:{line}"

    def report(self, problems: Iterable[Problem]) -> list[str]:
        """Each problem as `file:line: dotted.path: message`, by line; each line once."""
        by_line = sorted(problems, key=lambda problem: self.line(problem.path) or 0)
        return list(dict.fromkeys(map(self._report, by_line)))

    def _report(self, problem: Problem) -> str:
        where = ".".join(problem.path) or "the top level"
        at = self.at(problem.path)
        return f"{at}: {where}: {problem.message}" if at else f"{where}: {problem.message}"

    def duplicates(self) -> Iterator[Path]:
        """Each key that a mapping has twice: YAML keeps the last, silently."""
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
    """Line and value of a key of a mapping or of an index of a list."""
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
    """A hint at the valid name that `name` was probably meant to be, or at all of them if few."""
    names = sorted(valid)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {', '.join(names)})" if names and len(names) <= 10 else ""
