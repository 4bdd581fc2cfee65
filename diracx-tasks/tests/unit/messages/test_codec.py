from __future__ import annotations

import contextlib
import enum
import math
import os
import uuid
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple
from zoneinfo import ZoneInfo

import msgpack
import pytest
from diracx.tasks.plumbing.messages.codec import MAX_DEPTH, dumps, loads
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, RootModel


def same(a: Any, b: Any) -> bool:
    """Equal, of the same type, all the way down; nan equals nan and 0.0 is not -0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        # Both orders are kept by msgpack.
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, Decimal):
        return str(a) == str(b)
    return a == b


offsets = st.timedeltas(timedelta(hours=-23, minutes=-59), timedelta(hours=23, minutes=59)).map(timezone)
hashables = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=()))
    | st.binary()
    | st.datetimes()
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.uuids()
)
scalars = hashables | st.floats() | st.decimals()
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(hashables, inner)
        | st.sets(hashables)
        | st.frozensets(st.tuples(hashables, hashables))
    ),
    max_leaves=20,
)


@given(values)
@settings(max_examples=300)
def test_P50_round_trip_loses_nothing(value):
    assert same(loads(dumps(value)), value)


aware = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=offsets | st.timezones())


@given(aware)
@settings(max_examples=300)
def test_P13_an_aware_datetime_keeps_its_instant_and_comes_back_in_utc(moment):
    back = loads(dumps({"when": [moment]}))["when"][0]
    assert back.utcoffset() == timedelta(0)
    assert back == moment.astimezone(UTC)


@given(st.datetimes(timezones=st.just(UTC)))
def test_P13_microseconds_at_both_ends_of_the_calendar(moment):
    assert loads(dumps(moment)) == moment


@pytest.mark.parametrize("moment", [datetime.min, datetime.max])
def test_P13_the_first_and_last_instant_of_the_calendar_round_trip(moment):
    assert loads(dumps(moment)) == moment
    assert loads(dumps(moment.replace(tzinfo=UTC))) == moment.replace(tzinfo=UTC)


def test_an_instant_outside_the_calendar_is_refused_when_sent():
    with pytest.raises(ValueError, match="outside the calendar"):
        dumps(datetime.min.replace(tzinfo=timezone(timedelta(hours=1))))


@given(st.times(timezones=offsets))
def test_aware_times_keep_their_offset(value):
    back = loads(dumps(value))
    assert back == value
    assert back.utcoffset() == value.utcoffset()


def test_a_time_in_a_zone_without_fixed_offset_is_refused():
    with pytest.raises(TypeError, match="pass a datetime"):
        dumps(time(2, 30, tzinfo=ZoneInfo("Europe/Zurich")))


def test_the_second_of_two_equal_local_times_stays_the_second():
    assert loads(dumps(datetime(2026, 10, 25, 2, 30, fold=1))).fold == 1


class Colour(enum.Enum):
    RED = "red"
    BIG = 2**70
    PAIR = (1, 2)
    AMOUNT = Decimal("1.50")


class Level(enum.IntEnum):
    HIGH = 3


class Mode(enum.StrEnum):
    FAST = "fast"


class Point(NamedTuple):
    x: int
    y: int


class LockType(str):
    """A subclass of `str`, as `LockedObjectType`."""

    __slots__ = ()


class Whole(int):
    pass


class Share(float):
    pass


class Moment(datetime):
    pass


@dataclass
class Inner:
    path: Path
    tags: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Frozen:
    n: int


class Model(BaseModel):
    model_config = ConfigDict(extra="allow")
    inner: Inner
    level: Level


class Names(RootModel[list[str]]):
    pass


@pytest.mark.parametrize(
    ("sent", "back"),
    [
        (Colour.RED, "red"),
        (Colour.BIG, 2**70),
        (Colour.PAIR, (1, 2)),
        (Colour.AMOUNT, Decimal("1.50")),
        (Level.HIGH, 3),
        (Mode.FAST, "fast"),
        ({Mode.FAST: Level.HIGH}, {"fast": 3}),
        (Point(1, 2), (1, 2)),
        (LockType("task"), "task"),
        (Whole(7), 7),
        (Whole(2**99), 2**99),
        (Share(0.5), 0.5),
        (Moment(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)),
        (OrderedDict(a=1), {"a": 1}),
        (defaultdict(list, a=[1]), {"a": [1]}),
        (bytearray(b"x"), b"x"),
        (Path("/tmp/x"), "/tmp/x"),
        (PurePosixPath("x/y"), "x/y"),
        (Inner(Path("a"), {"t"}), {"path": "a", "tags": {"t"}}),
        (Frozen(1), {"n": 1}),
        ({Frozen(1)}, [{"n": 1}]),
        (
            Model(inner=Inner(Path("a")), level=Level.HIGH, more=1),
            {"inner": {"path": "a", "tags": set()}, "level": 3, "more": 1},
        ),
        (Names(["a"]), ["a"]),
        ({"deep": [(Inner(Path("a")),)]}, {"deep": [({"path": "a", "tags": set()},)]}),
        (Decimal("sNaN123"), Decimal("sNaN123")),
        (Decimal("-0.00"), Decimal("-0.00")),
        (date(1, 1, 1), date(1, 1, 1)),
        (uuid.UUID(int=5), uuid.UUID(int=5)),
        (os.fsdecode(b"caf\xe9"), "caf\udce9"),
    ],
)
def test_values_arrive_as_the_documented_types(sent, back):
    assert same(loads(dumps(sent)), back)


@pytest.mark.parametrize("value", [object(), len, (n for n in ()), 1j, range(3), Inner, open])
def test_values_without_an_encoding_are_refused_by_name(value):
    cls = type(value)
    with pytest.raises(TypeError, match=rf"cannot encode a value of type {cls.__module__}\.{cls.__qualname__}"):
        dumps({"a": [(value,)]})


def test_a_recursive_value_is_refused():
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match=r"recursion|deep"):
        dumps(loop)


#: One more container around what is inside it, as a value and as bytes from outside.
AROUND: dict[str, tuple[Callable[[Any], Any], Callable[[bytes], bytes]]] = {
    "list": (lambda value: [value], lambda data: b"\x91" + data),
    "dict": (lambda value: {"a": value}, lambda data: b"\x81\xa1a" + data),
    "tuple": (lambda value: (value,), lambda data: msgpack.packb(msgpack.ExtType(10, b"\x91" + data))),
}


@given(st.integers(1, 3 * MAX_DEPTH), st.data())
@settings(max_examples=200, deadline=None)
def test_containers_nest_to_one_depth_in_both_directions_whatever_they_are(depth, draw):
    kinds = draw.draw(st.lists(st.sampled_from(sorted(AROUND)), min_size=depth, max_size=depth))
    value, data = None, b"\xc0"
    for kind in kinds:
        value, data = AROUND[kind][0](value), AROUND[kind][1](data)
    if depth <= MAX_DEPTH:
        assert dumps(value) == data
        assert same(loads(data), value)
    else:
        with pytest.raises(ValueError, match="nested more than 32 deep"):
            dumps(value)
        with pytest.raises(ValueError, match="nested more than 32 deep"):
            loads(data)


@pytest.mark.parametrize("kind", [*AROUND, "timedelta", "mixed"])
def test_bytes_that_nest_a_hundred_thousand_deep_do_not_overflow_the_stack(kind):
    steps = {
        **{name: around[1] for name, around in AROUND.items()},
        "timedelta": lambda data: msgpack.packb(msgpack.ExtType(5, data)),
    }
    order = [steps[kind]] if kind != "mixed" else list(steps.values())
    data = b"\xc0"
    for level in range(100_000 if kind in ("list", "dict") else 3_000):
        data = order[level % len(order)](data)
    with pytest.raises(ValueError, match="not an encoded value"):
        loads(data)


def test_values_that_nest_without_end_do_not_overflow_the_stack():
    tuples: Any = ()
    mixed: Any = None
    for _ in range(5_000):
        tuples = (tuples,)
    for level in range(20_000):
        mixed = (mixed,) if level % 500 == 0 else [mixed]
    for value in (tuples, mixed):
        with pytest.raises(ValueError, match=r"deep|recursion"):
            dumps(value)


class Hostile:
    """A property of a model that cannot be read."""

    __dataclass_fields__: ClassVar[dict[str, Any]] = Inner.__dataclass_fields__

    @property
    def path(self) -> str:
        raise ZeroDivisionError


def test_a_value_that_cannot_be_read_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^cannot encode it: ZeroDivisionError$"):
        dumps(Hostile())


@given(st.binary(max_size=40))
@settings(max_examples=300)
def test_P8_garbage_raises_value_error_and_nothing_else(data):
    with contextlib.suppress(ValueError):
        loads(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        dumps([1, 2])[:-1],
        dumps(1) + dumps(2),
        msgpack.packb(msgpack.ExtType(99, b"x")),
        msgpack.packb(msgpack.ExtType(6, b"not a decimal")),
        msgpack.packb(msgpack.Timestamp(2**60, 0)),
        b"\x81\x80\x01",  # a dict as key
        b"\xa1\xff",  # text that is not UTF-8
    ],
)
def test_P8_damaged_data_is_refused(data):
    with pytest.raises(ValueError, match="not an encoded value"):
        loads(data)


def test_plain_values_are_plain_msgpack():
    value = {"a": [1, 2.5, "x", b"y", None, True]}
    assert dumps(value) == msgpack.packb(value)
    assert msgpack.unpackb(dumps(datetime(2026, 1, 1, tzinfo=UTC)), timestamp=3) == datetime(
        2026, 1, 1, tzinfo=UTC
    )
