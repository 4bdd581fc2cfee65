"""Secrets in texts: values that a task declares to be secret, and the passwords of URLs."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, quote_plus, unquote_plus

if TYPE_CHECKING:
    from ..base_task import BaseTask
    from ..broker.models import TaskMessage

#: What stands where a value is not for everybody's eyes.
MASK = "•••"
#: So many characters of a secret in a row are hidden, wherever the rest of it was cut off.
_FRAGMENT = 6
#: Longer secrets and texts are not searched for each other: the text is hidden as a whole.
_LONGEST_SECRET, _LONGEST_TEXT = 50_000, 200_000
#: Shorter parts of a secret that is no text itself, as the user of a pair, would be found anywhere.
_SHORTEST_PART = 4


def without_secrets(text: str, task: BaseTask) -> str:
    """The text without the values of the task's secret fields."""
    from .arguments import secret_names

    names = secret_names(type(task))
    if not names:
        return text
    return hide(text, (getattr(task, name, getattr(task, f"_{name}", None)) for name in names))


def without_secrets_of(text: str, task_class: type[BaseTask], message: TaskMessage) -> str:
    """The same, for a message of which no task can be made."""
    from .arguments import shape_of

    return hide(text, shape_of(task_class).secret_values(message.task_args, message.task_kwargs))


def hide(text: str, secrets: Iterable[Any]) -> str:
    """The text without these values, and without fragments of them: as they are, escaped or encoded.

    The work grows with the length of the text plus that of the secrets.
    """
    forms = {form for value in secrets for form in _forms(value)}
    if not forms:
        return text
    if len(text) > _LONGEST_TEXT or sum(map(len, forms)) > _LONGEST_SECRET:
        return MASK
    hidden = bytearray(len(text))
    for form in forms:
        if 1 < len(form) < _FRAGMENT:  # a single letter is anywhere
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
    """How a value may stand in a text."""
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
    """The text as URLs, JSON, HTML, Python literals, base64 and hexadecimal have it."""
    data = text.encode(errors="surrogatepass")
    yield json.dumps(text)[1:-1]
    yield from (repr(text)[1:-1], ascii(text)[1:-1], repr(data)[2:-1])
    yield html.escape(text)
    yield from _encoded_bytes(data)


def _encoded_bytes(data: bytes) -> Iterator[str]:
    """The bytes as URLs, base64 and hexadecimal have them."""
    for url in (quote(data), quote(data, safe=""), quote_plus(data)):
        yield from (url, re.sub("%..", lambda found: found[0].lower(), url))
    yield from (data.hex(), data.hex().upper())
    for skipped in range(3):  # what stands before it moves it by so many bytes
        whole = data[skipped : skipped + (len(data) - skipped) // 3 * 3]
        yield from (base64.b64encode(whole).decode(), base64.urlsafe_b64encode(whole).decode())


_SCHEME = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]{0,31}://")
#: What follows the host where there is no user: a port, and perhaps a path.
_PORT = re.compile(r"\d{1,5}(?:[/?#,].*)?")
_PARAMETER = re.compile(r"([?&;])([\w.%+-]{1,64})=")
_SECRET_NAME = re.compile(r"pass|pwd|secret|token|credential|api.?key|access.?key", re.IGNORECASE)


def mask(text: str, longest: int | None = None) -> str:
    """The text with the passwords of all URLs in it replaced by `***`: those of the user, and those in the query.

    Where a password ends cannot be told in a text, for it may hold quotes, blanks and `@`: all is masked up to the
    last `@` of the line, and a line that begins with a URL is taken for nothing but a URL. The work grows with
    the length of the text.

    Args:
        longest: cut the text after so many characters; a password that is cut there is masked as well.
    """
    cut = longest is not None and len(text) > longest
    if cut:
        text = text[:longest]
    if "://" in text or "=" in text:
        *lines, last = text.split("\n")
        text = "\n".join([*map(_masked_line, lines), _masked_line(last, cut)])
    return f"{text}…" if cut else text


def last_lines(text: str, longest: int) -> str:
    """The end of a text, from the beginning of a line on; the beginning of its last line where that is too long.

    No password that `mask` would find is cut.
    """
    if len(text) <= longest:
        return text
    start = text.find("\n", len(text) - longest, -1)
    if start >= 0:
        return text[start + 1 :]
    return mask(text[text.rfind("\n", 0, -1) + 1 :], longest)


def _masked_line(line: str, cut: bool = False) -> str:
    alone = _SCHEME.match(line)
    if alone:
        line = alone[0] + _without_password(line[alone.end() :], True, cut)
    elif "://" in line:
        before, *others, last = line.split("://")
        others = [_without_password(other, False, False) for other in others]
        line = "://".join((before, *others, _without_password(last, False, cut)))
    return _without_parameters(line, bool(alone)) if "=" in line else line


def _without_password(after: str, alone: bool, cut: bool) -> str:
    """What follows a `://`.

    Args:
        alone: nothing but a URL.
        cut: it is the beginning of something longer.
    """
    user, colon, password = after.partition(":")
    if not colon or "/" in user or "?" in user or "#" in user or password.startswith("***@"):
        return after
    if not alone:
        if any(map(str.isspace, user)):
            return after
        [word] = password.split(maxsplit=1)[:1] or [""]
        word = word.rstrip("'\").,:;")
        if user and "@" not in word and _PORT.fullmatch(word):
            return after
    at = len(password) if cut else password.rfind("@")
    return after if at < 0 else f"{user}:***{password[at:]}"


def _without_parameters(line: str, alone: bool) -> str:
    """The line without the values of secret parameters: up to the next parameter, and no blank in a text."""
    shown, done = [], 0
    for found in _PARAMETER.finditer(line):
        if found.start() < done or not _SECRET_NAME.search(unquote_plus(found[2])):
            continue
        end = found.end()
        value = _VALUE_ALONE if alone else _VALUE
        shown += [line[done:end], "***"]
        done = value.match(line, end).end()  # type: ignore[union-attr]  # matches nothing as well
    return "".join([*shown, line[done:]])


_VALUE, _VALUE_ALONE = re.compile(r"[^&#\s]*"), re.compile(r"[^&#]*")
