"""Hide secret values in texts: as they are, escaped or encoded, and fragments of them."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

#: What stands where a value is not for everybody's eyes.
MASK = "•••"
#: So many characters of a secret in a row are hidden, wherever the rest of it was cut off.
_FRAGMENT = 6
#: Longer secrets and texts are not searched for each other: the text is hidden as a whole.
_LONGEST_SECRET, _LONGEST_TEXT = 50_000, 200_000
#: Shorter parts of a secret that is no text itself, as the user of a pair, would be found anywhere.
_SHORTEST_PART = 4


def hide(text: str, secrets: Iterable[Any]) -> str:
    """Remove these values, and fragments of them, from a text: as they are, escaped or encoded.

    The work grows with the length of the text plus that of the secrets.
    """
    forms = {form for value in secrets for form in _forms(value)}
    if not forms:
        return text
    if len(text) > _LONGEST_TEXT or sum(map(len, forms)) > _LONGEST_SECRET:
        return MASK
    hidden = bytearray(len(text))
    for form in forms:
        if 1 < len(form) < _FRAGMENT:  # a single character is everywhere
            for found in re.finditer(re.escape(form), text):
                hidden[found.start() : found.end()] = b"\1" * len(form)
    places: dict[str, list[int]] = {}
    for start in range(len(text) - _FRAGMENT + 1):
        places.setdefault(text[start : start + _FRAGMENT], []).append(start)
    for written in {each for form in forms for each in (form, *_encoded(form))}:
        for start in range(len(written) - _FRAGMENT + 1):
            for place in places.pop(written[start : start + _FRAGMENT], ()):
                hidden[place : place + _FRAGMENT] = b"\1" * _FRAGMENT
    runs = re.finditer(b"\0+|\1+", hidden)
    return "".join(MASK if hidden[run.start()] else text[run.start() : run.end()] for run in runs)


def _forms(value: Any) -> Iterator[str]:
    """List the forms in which a value may stand in a text."""
    if hasattr(value, "get_secret_value"):
        value = value.get_secret_value()
    if value is None or isinstance(value, bool):  # in every text, and no secret
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
    for skipped in range(3):  # what stands before it moves it by so many bytes
        whole = data[skipped : skipped + (len(data) - skipped) // 3 * 3]
        yield from (base64.b64encode(whole).decode(), base64.urlsafe_b64encode(whole).decode())
