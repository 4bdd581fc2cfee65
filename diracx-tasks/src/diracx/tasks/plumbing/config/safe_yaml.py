"""Loader of YAML files that refuses what would occupy or crash the reader."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.scanner import ScannerError

#: Values of a document, those of repeated aliases included: "billion laughs" have 10^9 in ten lines.
_MOST_VALUES = 1_000_000
#: More are allowed in a document that has so many itself, and repeats them this often on average.
_MOST_REPETITIONS = 50


class SafeLoader(yaml.SafeLoader):
    """Loads plain values. Raises `YAMLError` with a mark, or `RecursionError`."""

    def get_single_node(self) -> yaml.Node | None:
        """Parse the document, without its values."""
        try:
            node: yaml.Node | None = super().get_single_node()
        except (ValueError, OverflowError) as error:  # "\U00110000"
            raise ScannerError(None, None, "found no such character", self.get_mark()) from error
        known: dict[int, int] = {}
        if node is not None and _values(node, known) > max(_MOST_VALUES, _MOST_REPETITIONS * len(known)):
            raise ComposerError(None, None, "its aliases repeat too many values", node.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Make the value of a node."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, OverflowError) as error:  # 2026-02-30, !!bool x
            kind = node.tag.rpartition(":")[2]
            what = f"this is no valid {kind}; in quotes it would be text"
            raise ConstructorError(None, None, what, node.start_mark) from error


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values of a node; `known` has those of nodes that aliases repeat."""
    if id(node) not in known:
        known[id(node)] = 1  # for aliases of itself
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        known[id(node)] += sum(
            _values(each, known) for part in parts for each in (part if isinstance(part, tuple) else (part,))
        )
    return known[id(node)]
