"""Regular expressions of a distribution, and texts that make slow ones slow."""

from __future__ import annotations

import ast
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

_METHODS = ("search", "match", "fullmatch", "split", "sub", "findall", "finditer")
_LENGTH = 30_000
#: Linear ones take a few ms; those that take longer are given more.
_SUSPICIOUS_SECONDS = 0.05


def patterns_of(source: Path) -> dict[str, tuple[re.Pattern[str], set[str]]]:
    """Every pattern that is written out in a call of `re`, by file and line, with the methods it is used with."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        if "import re\n" not in (text := path.read_text()):
            continue
        nodes = list(ast.walk(ast.parse(text)))
        names: dict[ast.AST, list[str]] = {}
        for line in nodes:
            if isinstance(line, ast.Assign):
                variables = [each.id for each in line.targets if isinstance(each, ast.Name)]
                for part in ast.walk(line.value):
                    names.setdefault(part, []).extend(variables)
        for call in nodes:
            if (used := _used(call)) is None:
                continue
            methods = {used}
            if used == "compile":
                methods = {each for each in _METHODS for name in names.get(call, ()) if f"{name}.{each}(" in text}
            where = f"{path.relative_to(source)}:{call.lineno}:{call.col_offset}"  # type: ignore[attr-defined]
            found[where] = (_compiled(call), methods or {"search"})
    return found


def _used(node: ast.AST) -> str | None:
    """The function of `re` that is called, if it is one, with a pattern that can be read here."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
        return None
    if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "re"):
        return None
    readable = isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
    return node.func.attr if readable and node.func.attr in ("compile", *_METHODS) else None


def _compiled(call: Any) -> re.Pattern[str]:
    flags = 0
    for each in ast.walk(call):
        if isinstance(each, ast.Attribute) and each.attr.isupper():
            flags |= int(getattr(re, each.attr))
    return re.compile(call.args[0].value, flags)


def assert_linear(pattern: re.Pattern[str], methods: set[str]) -> None:
    """Fail if the time that the pattern takes grows faster than the text."""
    for text in _hostile_texts(pattern):
        for method in methods:
            taken = _seconds(pattern, method, text)
            if taken > _SUSPICIOUS_SECONDS:
                grown = _seconds(pattern, method, text[:-1] * 4 + text[-1]) / taken
                assert grown < 8, (pattern.pattern, method, text[:100])


def _seconds(pattern: re.Pattern[str], method: str, text: str) -> float:
    use: Callable[..., Any] = getattr(pattern, method)
    begun = time.process_time()
    found = use("", text) if method == "sub" else use(text)
    list(found if method == "finditer" else ())
    return time.process_time() - begun


def _hostile_texts(pattern: re.Pattern[str]) -> Iterator[str]:
    """Long texts of prefixes and repeated pieces of matches, with a mismatch at the end."""
    samples: list[str] = []

    @given(st.from_regex(pattern))
    @settings(
        max_examples=10,
        phases=[Phase.generate],
        database=None,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    def collect(text: str) -> None:
        samples.append(text[:60])

    collect()
    pieces = {" ", "a", "0", "\n", "=", '"', "(", ":", "/", "a.", "0-", "\0"}
    for sample in samples:
        middle = len(sample) // 2
        pieces |= {sample, sample[:-1], sample[:middle], sample[middle:], sample[1:], sample[:1], sample[-1:]}
    words = _words(pattern.pattern)
    runs = {"0".join(words[first:last]) for last in range(len(words) + 1) for first in range(last)}
    beginnings = {"", *("0".join(words[:last]) + "0" for last in range(1, len(words)))}
    beginnings |= {sample[: len(sample) // 2] for sample in samples[:2]}
    for piece in sorted((pieces | runs | {f"{run}0" for run in runs}) - {""}):
        for beginning in sorted(beginnings) if piece.removesuffix("0") in runs else sorted(beginnings)[:2]:
            yield beginning + piece * (_LENGTH // len(piece)) + "\x01"


def _words(pattern: str) -> list[str]:
    """Return the literal texts of a pattern in order, without repetitions, alternatives and classes."""
    literal = re.sub(r"\[[^\]]*\]|\(\?<?[=!:]|\\[a-zA-Z]", "|", pattern)
    return [word for word in re.split(r"[|\\(){}*+?^$.\[\]]+", literal) if word][:7]
