"""Encodes Python values for Redis with msgpack and extension types. Never pickle.

Plain values (None, bool, int, float, str, bytes, list, dict) are encoded by msgpack's C code alone. Other values
are decoded as follows:

| encoded | decoded |
|---|---|
| int beyond 64 bits, tuple, set, frozenset, date, time, timedelta, Decimal, UUID, naive datetime | itself |
| aware datetime | the same instant in UTC, to the microsecond |
| subclass of a type above (named tuple, `OrderedDict`, str subclass, …) | the type it derives from |
| Enum member | its value |
| dataclass instance, pydantic model | dict of its fields |
| pydantic secret | itself, so that it stays masked; any other than str and bytes as `Secret` |
| Path, IP address or network, pydantic URL | str |

Containers nest at most `MAX_DEPTH` deep, in encoding and decoding, so that no message overflows the stack.
Dictionary keys must be scalars. A set whose decoded elements are unhashable (frozen dataclasses become dicts) is
decoded as a list; `arguments.rebuild` converts it to a set by its annotation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from itertools import chain
from pathlib import PurePath
from typing import Any
from uuid import UUID

import msgpack

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# Extension codes are part of the wire format: never renumber, only add. A message with a code that older versions
# do not know must have a greater `FORMAT`, see broker/models.py.
_BIG_INT, _NAIVE_DATETIME, _DATE, _TIME, _TIMEDELTA, _DECIMAL, _UUID, _SET, _FROZENSET, _TUPLE = range(1, 11)
_SECRET = 11

#: Maximum nesting of containers: lists, dicts, tuples and sets.
MAX_DEPTH = 32
_CONTAINERS = frozenset({dict, list, tuple, set, frozenset})
#: First bytes of containers and extensions in msgpack, and all other bytes.
_BEGINS = {*range(0x80, 0xA0), *range(0xC7, 0xCA), *range(0xD4, 0xD9), *range(0xDC, 0xE0)}
_NO_CONTAINER = bytes(set(range(256)) - _BEGINS)
_LONGEST_REASON = 200
#: Maximum length to decode without C code, which takes 100 times as long.
_CAREFUL_BYTES = 1_000_000


def dumps(value: Any) -> bytes:
    """Encode `value`.

    Raises `TypeError` naming a type that has no encoding, and `ValueError` for a value that is nested more than
    `MAX_DEPTH` deep (as a container in itself), outside the calendar, or cannot be read.
    """
    try:
        data = _pack(value)
        if _may_be_too_deep(data):
            _check_depth(_unpack(data))
    except TypeError:
        raise
    except RecursionError as exc:
        raise ValueError(f"cannot encode it: {_TOO_DEEP}") from exc
    except Exception as exc:  # properties of user classes may raise anything
        raise ValueError(f"cannot encode it: {_reason(exc)}") from exc
    return data


def loads(data: bytes, *, careful: bool = False) -> Any:
    """Decode a result of `dumps`. Raises `ValueError` for anything else.

    Args:
        careful: decode without C code, for messages that processes crashed with, up to 1 MB.
    """
    try:
        value = _unpack_carefully(data) if careful else msgpack.unpackb(data, **_UNPACKING)
        if _may_be_too_deep(data):
            _check_depth(value)
    except Exception as exc:
        raise ValueError(f"not an encoded value: {_reason(exc)}") from exc
    return value


_TOO_DEEP = f"nested more than {MAX_DEPTH} deep"


def _may_be_too_deep(data: bytes) -> bool:
    """Return whether there are enough first bytes of containers, which is much faster than checking all values."""
    return len(data) > MAX_DEPTH and len(data.translate(None, _NO_CONTAINER)) > MAX_DEPTH


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [each for each in level if type(each) in _CONTAINERS]
        if not level:
            return
        level = list(chain.from_iterable([each.values() if type(each) is dict else each for each in level]))
    raise ValueError(_TOO_DEEP)


def _unpack_carefully(data: bytes) -> Any:
    from msgpack import fallback

    if len(data) > _CAREFUL_BYTES:
        raise ValueError(f"{len(data)} bytes are too many to decode without C code")
    _nesting.unpackb = fallback.unpackb
    try:
        return _unpack(data)
    finally:
        del _nesting.unpackb


class _Nesting(threading.local):
    """Limits nested extensions in encoding and decoding, each of which takes 40 kB of the C stack."""

    depth = 0
    unpackb: Callable[..., Any] = staticmethod(msgpack.unpackb)

    def call(self, function: Callable[[Any], Any], value: Any) -> Any:
        if self.depth >= MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        self.depth += 1
        try:
            return function(value)
        finally:
            self.depth -= 1


_nesting = _Nesting()


def _reason(error: Exception) -> str:
    """Return the message of an error, truncated, as it may quote the value."""
    try:
        message = str(error) or type(error).__name__
    except Exception:
        message = type(error).__name__
    return message if len(message) <= _LONGEST_REASON else f"{message[:_LONGEST_REASON]}…"


def leading_fields(data: bytes) -> tuple[dict[Any, Any], Any]:
    """Decode the complete fields of a truncated dictionary, and the name of the truncated field, or None.

    Raises `ValueError` if it is not a dictionary.
    """
    fields: dict[Any, Any] = {}
    name: Any = None
    try:
        unpacker = msgpack.Unpacker(**_UNPACKING)
        unpacker.feed(data)
        for _ in range(unpacker.read_map_header()):
            name = unpacker.unpack()
            fields[name] = unpacker.unpack()
            name = None
    except msgpack.OutOfData:
        return fields, name
    except Exception as exc:
        raise ValueError(f"not an encoded dictionary: {exc or type(exc).__name__}") from exc
    return fields, None


def _pack(value: Any) -> bytes:
    try:
        packed: bytes = msgpack.packb(value, default=_encode, strict_types=True)
    except UnicodeEncodeError:
        # Lone surrogates, as in file names that are not UTF-8. `surrogatepass` is slower.
        packed = msgpack.packb(value, default=_encode, strict_types=True, unicode_errors="surrogatepass")
    return packed


def _unpack(data: bytes) -> Any:
    return _nesting.unpackb(data, **_UNPACKING)


def _encode(value: Any) -> Any:
    """Encode a value that msgpack does not support; called once per value."""
    encode = _ENCODERS.get(type(value))
    if encode is None:
        encode = _encoder_for(type(value))
    return _nesting.call(encode, value)


def _encoder_for(cls: type) -> Callable[[Any], Any]:
    """Return the encoder for a subclass, or a class that is encoded as its fields or text."""
    if issubclass(cls, Enum):  # before str and int, which an Enum may also be
        return lambda value: _final(value.value)
    if hasattr(cls, "__pydantic_root_model__"):  # before dataclasses: a model may derive from one
        return _encode_pydantic
    if hasattr(cls, "__dataclass_fields__"):
        return lambda value: {field.name: getattr(value, field.name) for field in fields(value)}
    if issubclass(cls, PurePath) or any(base.__module__.startswith(_AS_TEXT) for base in cls.__mro__):
        return str
    if hasattr(cls, "get_secret_value"):
        return lambda value: msgpack.ExtType(_SECRET, _pack(value.get_secret_value()))
    for base, encode in _ENCODERS.items():
        if issubclass(cls, base):
            return encode
    raise TypeError(
        f"cannot encode a value of type {cls.__module__}.{cls.__qualname__}: pass plain data, a dataclass or a "
        "pydantic model"
    )


#: Modules whose classes are encoded as text.
_AS_TEXT = ("ipaddress", "pydantic.networks", "pydantic_core")


def _decode_secret(data: bytes) -> Any:
    from pydantic import Secret, SecretBytes, SecretStr

    value = _unpack(data)
    if isinstance(value, str):
        return SecretStr(value)
    return SecretBytes(value) if isinstance(value, bytes) else Secret(value)


def _final(value: Any) -> Any:
    """Return `value` if msgpack supports it, else its encoding."""
    cls = type(value)
    if cls in _NATIVE or (cls is int and -(2**63) <= value < 2**64):
        return value
    return _encode(value)


_NATIVE = frozenset({type(None), bool, float, str, bytes, bytearray, list, dict})


def _encode_pydantic(value: Any) -> Any:
    names = type(value).__pydantic_fields__
    if getattr(type(value), "__pydantic_root_model__", False):
        return _final(value.root)
    encoded = {name: getattr(value, name) for name in names}
    encoded.update(value.__pydantic_extra__ or {})
    return encoded


def _encode_int(value: int) -> Any:
    value = int(value)
    if -(2**63) <= value < 2**64:
        return value
    size = value.bit_length() // 8 + 1
    return msgpack.ExtType(_BIG_INT, value.to_bytes(size, "big", signed=True))


def _encode_datetime(value: datetime) -> Any:
    if value.utcoffset() is None:
        v = value
        parts = [v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond, v.fold]
        return msgpack.ExtType(_NAIVE_DATETIME, _pack(parts))
    try:
        since = value.astimezone(UTC) - _EPOCH
    except OverflowError as exc:
        raise ValueError(f"cannot encode {value!r}: it is outside the calendar in UTC") from exc
    return msgpack.Timestamp(since.days * 86400 + since.seconds, since.microseconds * 1000)


def _encode_time(value: time) -> Any:
    offset = value.utcoffset()
    if offset is None and value.tzinfo is not None:
        raise TypeError(f"cannot encode {value!r}: its zone has no fixed offset without a date; pass a datetime")
    shift = None if offset is None else [offset.days, offset.seconds, offset.microseconds]
    parts = [value.hour, value.minute, value.second, value.microsecond, value.fold, shift]
    return msgpack.ExtType(_TIME, _pack(parts))


def _decode_time(data: bytes) -> time:
    hour, minute, second, microsecond, fold, shift = _unpack(data)
    zone = None if shift is None else timezone(timedelta(*shift)) if any(shift) else UTC
    return time(hour, minute, second, microsecond, zone, fold=fold)


def _decode_naive_datetime(data: bytes) -> datetime:
    *parts, fold = _unpack(data)
    return datetime(*parts, fold=fold)


def _decode_elements(kind: type[set[Any]] | type[frozenset[Any]]) -> Callable[[bytes], Any]:
    def decode(data: bytes) -> Any:
        elements = _unpack(data)
        try:
            return kind(elements)
        except TypeError:
            return elements

    return decode


def _as_list(code: int) -> Callable[[Any], Any]:
    return lambda value: msgpack.ExtType(code, _pack(list(value)))


_ENCODERS: dict[type, Callable[[Any], Any]] = {
    int: _encode_int,
    tuple: _as_list(_TUPLE),
    set: _as_list(_SET),
    frozenset: _as_list(_FROZENSET),
    datetime: _encode_datetime,  # before date, its base class
    date: lambda value: msgpack.ExtType(_DATE, value.isoformat().encode()),
    time: _encode_time,
    timedelta: lambda v: msgpack.ExtType(_TIMEDELTA, _pack([v.days, v.seconds, v.microseconds])),
    Decimal: lambda value: msgpack.ExtType(_DECIMAL, str(value).encode()),
    UUID: lambda value: msgpack.ExtType(_UUID, value.bytes),
    # For subclasses of types that msgpack supports.
    str: str.__str__,
    float: float,
    bytes: bytes,
    bytearray: bytes,
    list: list,
    dict: dict,
}

_DECODERS: dict[int, Callable[[bytes], Any]] = {
    _BIG_INT: lambda data: int.from_bytes(data, "big", signed=True),
    _NAIVE_DATETIME: _decode_naive_datetime,
    _DATE: lambda data: date.fromisoformat(data.decode()),
    _TIME: _decode_time,
    _TIMEDELTA: lambda data: timedelta(*_unpack(data)),
    _DECIMAL: lambda data: Decimal(data.decode()),
    _UUID: lambda data: UUID(bytes=data),
    _SET: _decode_elements(set),
    _FROZENSET: _decode_elements(frozenset),
    _TUPLE: lambda data: tuple(_unpack(data)),
    _SECRET: _decode_secret,
}


def _decode(code: int, data: bytes) -> Any:
    decode = _DECODERS.get(code)
    if decode is None:
        raise ValueError(f"unknown extension type {code}")
    return _nesting.call(decode, data)


#: Arguments of msgpack's decoders.
_UNPACKING: dict[str, Any] = {
    "ext_hook": _decode,
    "strict_map_key": False,
    "timestamp": 3,
    "unicode_errors": "surrogatepass",
}
