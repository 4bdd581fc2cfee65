"""Passwords of URLs are in no text that is shown, and looking for them costs little however the text is made."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from diracx.tasks.cli.errors import one_line
from diracx.tasks.plumbing._util.passwords import mask
from diracx.tasks.plumbing._util.secrets import MASK, hide
from diracx.tasks.plumbing.messages.error_info import describe_exception
from diracx.tasks.web.dashboard.rendering import short, tail
from hypothesis import given
from hypothesis import strategies as st

_alphabet = st.characters(categories=["L", "N", "P", "S"], exclude_characters="/?#*") | st.sampled_from("'\" @:=.")
passwords = st.text(_alphabet, min_size=4).filter(lambda text: text.strip() and "***" not in text)


@given(password=passwords, user=st.sampled_from(["", "user", "o'brien", "me@cern"]), encoded=st.booleans())
def test_no_password_of_a_url_is_shown(password: str, user: str, encoded: bool) -> None:
    written = quote(password, safe="") if encoded else password
    for url in (
        f"redis://{user}:{written}@host:6379/0",
        f"redis+sentinel://{user}:{written}@one:1,two:2/tasks/0?socket_timeout=3",
        f"mysql+aiomysql://{user}:{written}@[::1]/tasks",
    ):
        shown = mask(url)
        assert shown == url.replace(f"{user}:{written}@", f"{user}:***@")
        assert mask(shown) == shown


@pytest.mark.parametrize(
    "url",
    [
        "redis://h?password=open&db=1",
        "redis://h?a=1&ssl_password=o'pen",
        "redis://h?ssl_password=open sesame&db=1",
        "redis+sentinel://one/s?sentinel_password=open&sentinel_username=me",
        "redis://h?PASSWORD=open#fragment",
        "redis://h?pass%77ord=open",
        "https://h/x?access_token=open&api_key=open",
    ],
)
def test_no_password_in_the_query_of_a_url_is_shown(url: str) -> None:
    shown = mask(url)
    assert "open" not in shown
    assert "sesame" not in shown
    assert "***" in shown
    assert urlsplit(shown).fragment == urlsplit(url).fragment
    assert parse_qs(urlsplit(shown).query).keys() == parse_qs(urlsplit(url).query).keys()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot reach redis://:pa'ss@h:1: no reply", "cannot reach redis://:***@h:1: no reply"),
        ("at 'redis://u:pa ss@h'\nnext line: me@cern.ch", "at 'redis://u:***@h'\nnext line: me@cern.ch"),
        ("redis://a:b@h and redis://c:d@h", "redis://a:***@h"),
        ("at redis://a:b@h and redis://c:d@h", "at redis://a:***@h and redis://c:***@h"),
        ("see http://host:8443/x of me@cern.ch", "see http://host:8443/x of me@cern.ch"),
        ("at redis://localhost:6379/0: ask me@cern.ch", "at redis://localhost:6379/0: ask me@cern.ch"),
        ("a: b@c, x=1, no URL", "a: b@c, x=1, no URL"),
    ],
)
def test_only_passwords_are_masked_in_a_text(text: str, shown: str) -> None:
    assert mask(text) == shown


@given(st.integers(1, 80))
def test_a_truncated_password_is_not_shown(longest: int) -> None:
    text = "failed at redis://user:sesame-and-more@h:1?ssl_password=sesame-too&b=1 and so on"
    assert "ses" not in mask(text, longest)
    assert "ses" not in tail(text, longest)


@pytest.mark.parametrize("cut", range(7900, 8100, 7))
def test_a_truncated_traceback_contains_no_part_of_a_password(cut: int) -> None:
    line = "x" * cut
    description = describe_exception(ValueError(f"redis://user:sesame-and-more@h:1\n{line[:7980]}"))
    assert "and-more" not in mask(description["traceback"])
    description = describe_exception(ValueError(f"redis://user:sesame-and-more@h:1 {line}"))
    assert "and-more" not in mask(description["traceback"])


_HOSTILE = ["://a:", "://", "?a=", "?", ":", "@", "a", "://a:b@", "\n", "=", "://:@\n", "?password=", "&;", "'"]


@pytest.mark.parametrize("part", _HOSTILE)
@pytest.mark.parametrize(
    "work",
    [mask, lambda text: mask(text, 100_000), one_line, short, tail, lambda text: hide(text, ["secret" * 40])],
    ids=["mask", "mask and cut", "one_line", "short", "tail", "hide"],
)
def test_the_work_on_a_text_grows_with_its_length_only(work: Callable[[str], str], part: str) -> None:
    assert _seconds(work, "x" + part * (190_000 // len(part))) < 10  # a quadratic search takes minutes


def _seconds(work: Callable[[str], str], text: str) -> float:
    begun = time.process_time()
    work(text)
    return time.process_time() - begun


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_a_secret_of_bytes_is_hidden_however_it_is_written(kind: type[bytes | bytearray]) -> None:
    key = bytes(range(255, 159, -3))  # no text in any encoding
    for shown in (
        key.hex(),
        base64.b64encode(key).decode(),
        base64.urlsafe_b64encode(b"user:" + key).decode()[8:],
        quote(key),
        quote(key).lower(),
        repr(key),
    ):
        hidden = hide(f"refused {shown} at the door", [kind(key)])
        kept = hidden.removeprefix("refused ").removesuffix(" at the door")
        assert MASK in kept
        assert len(kept) < 12, f"{shown} is shown as {hidden}"


def test_a_secret_is_hidden_in_parts_and_encoded() -> None:
    secret = "correct-horse-battery-staple/with?odd&chars=é" * 2
    for shown in (
        secret[:57],
        f"{secret[:25]}...{secret[-25:]}",
        quote(secret),
        quote(secret, safe=""),
        quote(secret, safe="").lower(),
        repr(secret),
        ascii(secret),
        repr(secret.encode()),
        secret.encode().hex(),
        base64.b64encode(f"user:{secret}".encode()).decode(),
        json.dumps({"password": secret}),
    ):
        hidden = hide(f"refused {shown} at the door", [secret])
        assert hidden.startswith("refused ")
        assert hidden.endswith(" at the door")
        assert MASK in hidden
        for start in range(0, len(shown) - 12):
            if shown[start : start + 12] not in '{"password": "':
                assert shown[start : start + 12] not in hidden
