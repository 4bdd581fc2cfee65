"""Mask the passwords of URLs in texts."""

from __future__ import annotations

import re
from urllib.parse import unquote_plus

_SCHEME = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]{0,31}://")
#: Port and optional path after a host without user.
_PORT = re.compile(r"\d{1,5}(?:[/?#,].*)?")
_PARAMETER = re.compile(r"([?&;])([\w.%+-]{1,64})=")
_SECRET_NAME = re.compile(r"pass|pwd|secret|token|credential|api.?key|access.?key", re.IGNORECASE)


def mask(text: str, longest: int | None = None) -> str:
    """Replace the passwords of all URLs in a text by `***`: those of the user, and those in the query.

    The end of a password is ambiguous, as it may have quotes, blanks and `@`: all is masked up to the last `@` of
    the line, and a line that begins with a URL is treated as one URL. Runs in linear time.

    Args:
        longest: truncate the text to this number of characters; a truncated password is masked, too.
    """
    cut = longest is not None and len(text) > longest
    if cut:
        text = text[:longest]
    if "://" in text or "=" in text:
        *lines, last = text.split("\n")
        text = "\n".join([*map(_masked_line, lines), _masked_line(last, cut)])
    return f"{text}…" if cut else text


def last_lines(text: str, longest: int) -> str:
    """Truncate a text to its last whole lines, or to the beginning of its last line if that is too long.

    Passwords that `mask` would find are not truncated.
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
    """Mask the password in the text after a `://`.

    Args:
        alone: the line is one URL.
        cut: the text is truncated.
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
    """Mask the values of secret parameters in a line: up to the next parameter, or the next blank of a text."""
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
