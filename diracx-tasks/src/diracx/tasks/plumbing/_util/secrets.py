"""Removes secret values from texts: plain, escaped, encoded, and fragments of them."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

#: Text in place of a secret value.
MASK = "•••"
#: Minimum length of fragments of a secret that are removed.
_FRAGMENT = 6
#: Limits of the search; a longer text, or a text with longer secrets, is replaced as a whole.
_LONGEST_SECRET, _LONGEST_TEXT = 50_000, 200_000
#: Minimum length of parts of a composite secret; shorter ones would match anywhere.
_SHORTEST_PART = 4


def hide(text: str, secrets: Iterable[Any]) -> str:
    """Replace these values, plain, escaped or encoded, and fragments of them. Runs in linear time."""
    forms = {form for value in secrets for form in _forms(value)}
    if not forms:
        return text
    if len(text) > _LONGEST_TEXT or sum(map(len, forms)) > _LONGEST_SECRET:
        return MASK
    hidden = bytearray(len(text))
    for form in forms:
        if 1 < len(form) < _FRAGMENT:  # single characters would match anywhere
            for found in re.finditer(re.escape(form), text):
                hidden[found.start() : found.end()] = b"\1" * len(form)
    positions: dict[str, list[int]] = {}
    for start in range(len(text) - _FRAGMENT + 1):
        positions.setdefault(text[start : start + _FRAGMENT], []).append(start)
    for encoded in {each for form in forms for each in (form, *_encoded(form))}:
        for start in range(len(encoded) - _FRAGMENT + 1):
            for position in positions.pop(encoded[start : start + _FRAGMENT], ()):
                hidden[position : position + _FRAGMENT] = b"\1" * _FRAGMENT
    runs = re.finditer(b"\0+|\1+", hidden)
    return "".join(MASK if hidden[run.start()] else text[run.start() : run.end()] for run in runs)


def _forms(value: Any) -> Iterator[str]:
    """Yield the texts of a value and its parts."""
    if hasattr(value, "get_secret_value"):
        value = value.get_secret_value()
    if value is None or isinstance(value, bool):  # too common to be secret
        return
    yield str(value)
    yield repr(value)
    if isinstance(value, bytes | bytearray):
        yield repr(bytes(value))[2:-1]
        yield value.decode(errors="replace")
        yield from _encoded_bytes(bytes(value))
    elif isinstance(value, Mapping):
        yield from _parts(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from _parts(value)
    elif not isinstance(value, type) and (
        hasattr(value, "__dataclass_fields__") or hasattr(value, "__pydantic_root_model__")
    ):
        yield from _parts(getattr(value, name, None) for name in getattr(value, "__annotations__", ()))


def _parts(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        yield from (form for form in _forms(value) if len(form) >= _SHORTEST_PART)


def _encoded(text: str) -> Iterator[str]:
    """Encode a text as in URLs, JSON, HTML, Python literals, base64 and hexadecimal."""
    data = text.encode(errors="surrogatepass")
    yield json.dumps(text)[1:-1]
    yield from (repr(text)[1:-1], ascii(text)[1:-1], repr(data)[2:-1])
    yield html.escape(text)
    yield from _encoded_bytes(data)


def _encoded_bytes(data: bytes) -> Iterator[str]:
    """Encode bytes as in URLs, base64 and hexadecimal."""
    for url in (quote(data), quote(data, safe=""), quote_plus(data)):
        yield from (url, re.sub("%..", lambda found: found[0].lower(), url))
    yield from (data.hex(), data.hex().upper())
    for skipped in range(3):  # alignment in base64 depends on the bytes before it
        whole = data[skipped : skipped + (len(data) - skipped) // 3 * 3]
        yield from (base64.b64encode(whole).decode(), base64.urlsafe_b64encode(whole).decode())
