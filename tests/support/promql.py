"""Parser of PromQL that finds metrics and labels in alert rules and dashboards."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

AGGREGATIONS = {"sum", "min", "max", "avg", "count", "topk", "bottomk", "group"}
FUNCTIONS = {"absent", "delta", "deriv", "histogram_quantile", "increase", "label_replace", "rate"}
_RANGED = {"delta", "deriv", "increase", "rate"}
_BINARY = {"+", "-", "*", "/", "%", "==", "!=", ">", "<", ">=", "<=", "and", "or", "unless"}
_TOKEN = re.compile(
    r'\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<number>\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![a-z0-9.]))'
    r"|(?P<duration>\$__rate_interval|\d+[smhdw])|(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)"
    r"|(?P<sign>=~|!~|==|!=|>=|<=|[-+*/%<>=(){}\[\],]))"
)


class PromQLError(ValueError):
    """The expression is not one."""


@dataclass
class Asked:
    """Metrics and labels of an expression."""

    metrics: set[str] = field(default_factory=set)
    labels: set[str] = field(default_factory=set)


def read(expression: str) -> Asked:
    """Parts of an expression.

    Raises:
        PromQLError: saying where it cannot be read.
    """
    reader = _Reader(expression)
    reader.expression()
    if reader.kind != "end":
        raise PromQLError(f"{reader.text!r} is too much in {expression!r}")
    return reader.asked


class _Reader:
    def __init__(self, expression: str) -> None:
        self.asked = Asked()
        self._whole = expression
        self._tokens: list[tuple[str, str]] = []
        place, end = 0, len(expression.rstrip())
        while place < end:
            found = _TOKEN.match(expression, place)
            if found is None or found.lastgroup is None:
                raise PromQLError(f"{expression[place:]!r} cannot be read in {expression!r}")
            self._tokens.append((found.lastgroup, found[found.lastgroup]))
            place = found.end()
        self._tokens.append(("end", ""))
        self._at = 0

    @property
    def kind(self) -> str:
        return self._tokens[self._at][0]

    @property
    def text(self) -> str:
        return self._tokens[self._at][1]

    def _next(self) -> str:
        text = self.text
        self._at += 1
        return text

    def _take(self, text: str) -> bool:
        if self.text == text and self.kind != "string":
            self._at += 1
            return True
        return False

    def _need(self, what: str) -> str:
        """The next token, of this kind or with this text."""
        if what not in (self.kind, self.text):
            raise PromQLError(f"{self.text!r} stands where {what!r} should, in {self._whole!r}")
        return self._next()

    def expression(self) -> None:
        self._operand()
        while self.text in _BINARY and self.kind in ("sign", "name"):
            self._next()
            while self.text in ("on", "ignoring", "group_left", "group_right", "bool"):
                if self._next() != "bool" and self.text == "(":
                    self._labels()
            self._operand()

    def _operand(self) -> None:
        self._take("-")
        if self.kind in ("number", "string"):
            self._next()
        elif self._take("("):
            self.expression()
            self._need(")")
        else:
            self._named(self._need("name"))

    def _named(self, name: str) -> None:
        if name in AGGREGATIONS:
            grouped = self._grouping()
            self._arguments()
            if not grouped:
                self._grouping()
        elif self.text == "(":
            if name not in FUNCTIONS:
                raise PromQLError(f"there is no function {name!r}, in {self._whole!r}")
            ranged = self._arguments()
            if (name in _RANGED) != ranged:
                raise PromQLError(f"{name} is given {'a range' if ranged else 'no range'} in {self._whole!r}")
        else:
            self._selector(name)

    def _grouping(self) -> bool:
        if self.text not in ("by", "without"):
            return False
        self._next()
        self._labels()
        return True

    def _labels(self) -> None:
        self._need("(")
        while not self._take(")"):
            self.asked.labels.add(self._need("name"))
            self._take(",")

    def _arguments(self) -> bool:
        """True if the last of them is a range."""
        self._need("(")
        while True:
            self.expression()
            ranged = self._tokens[self._at - 1][1] == "]"
            if not self._take(","):
                break
        self._need(")")
        return ranged

    def _selector(self, name: str) -> None:
        self.asked.metrics.add(name)
        if self._take("{"):
            while not self._take("}"):
                self.asked.labels.add(self._need("name"))
                if self._next() not in ("=", "!=", "=~", "!~"):
                    raise PromQLError(f"a label of {name} is compared in no known way, in {self._whole!r}")
                self._need("string")
                self._take(",")
        if self._take("["):
            self._need("duration")
            self._need("]")
