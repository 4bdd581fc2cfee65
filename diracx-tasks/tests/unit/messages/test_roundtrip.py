"""Arguments of `schedule()` arrive equal and of the same types, or are refused by name."""

from __future__ import annotations

import collections
import dataclasses
import enum
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, Optional
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from diracx.tasks.plumbing.base_task import BaseTask
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.submission.client import Binding
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import (
    AliasChoices,
    AnyUrl,
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    PrivateAttr,
    RootModel,
    SecretBytes,
    SecretStr,
    create_model,
    field_validator,
)
from support.typed_values import Box, Model, T, arrived
from typing_extensions import TypedDict


class Colour(enum.Enum):
    RED = "red"
    PAIR = (1, 2)


class Level(enum.IntEnum):
    LOW = 1


class Mode(enum.StrEnum):
    R = "r"


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Name(str): ...


class Count(int): ...


class Site(NamedTuple):
    name: str
    colour: Colour


class Movie(TypedDict, total=False):
    name: str
    year: int


@dataclass
class TaskSignature:
    size: int


@dataclass
class Circle(TaskSignature):
    radius: float = 1.0


@dataclass
class Square(TaskSignature):
    side: float = 1.0


@dataclass(frozen=True)
class Tag:
    name: str
    cached: int = field(default=0, compare=False, init=False)


@dataclass
class Counted:
    number: int

    def __post_init__(self) -> None:
        self.number += 1


class SubModel(Model):
    more: str = ""


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: str = Field(default="", validation_alias=AliasChoices("n", "nn"))


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)
    path: Path
    level: Level = Level.LOW


class Doubled(BaseModel):
    number: int

    @field_validator("number")
    @classmethod
    def double(cls, value: int) -> int:
        return 2 * value


class Numbers(RootModel[list[int]]): ...


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    lives: int = 1


class Login(BaseModel):
    user: str
    password: SecretStr
    key: SecretBytes = SecretBytes(b"")
    url: HttpUrl = HttpUrl("https://host/")
    host: IPv4Address | None = None


class ModelBox(BaseModel, Generic[T]):
    content: T


UserId = NewType("UserId", int)


moments = st.datetimes(min_value=datetime(1, 1, 3), max_value=datetime(9999, 12, 29), timezones=st.timezones())


shapes = (
    st.builds(TaskSignature, st.integers()) | st.builds(Circle, st.integers()) | st.builds(Square, st.integers())
)


models = st.builds(Model, low=st.integers(), highest=st.integers()) | st.builds(SubModel, low=st.integers())


logins = st.builds(
    Login,
    user=st.text(),
    password=st.builds(SecretStr, st.text()),
    key=st.builds(SecretBytes, st.binary()),
    url=st.sampled_from([HttpUrl("https://a/b?c=d"), HttpUrl("http://1.2.3.4:80/")]),
    host=st.none() | st.builds(IPv4Address, st.integers(0, 2**32 - 1)),
)


#: Annotations, with values that fit them or nearly do.
KINDS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (bool, st.booleans() | st.integers(0, 1)),
    (int, st.integers() | st.booleans() | st.builds(Count, st.integers()) | st.just(Level.LOW)),
    (float, st.floats() | st.integers() | st.just(-0.0)),
    (str, st.text(st.characters()) | st.builds(Name, st.text()) | st.just(Mode.R)),
    (bytes, st.binary() | st.builds(bytearray, st.binary()) | st.builds(memoryview, st.binary())),
    (type(None), st.none()),
    (Decimal, st.decimals() | st.floats()),
    (UUID, st.uuids() | st.uuids().map(str)),
    (Path, st.sampled_from([Path("a/b"), Path(), "a/b", PurePosixPath("x")])),
    (date, st.dates() | moments),
    (datetime, moments | st.datetimes() | st.sampled_from(["2026-01-01T00:00:00Z", 0])),
    (
        time,
        st.times()
        | st.just(time(1, 2, tzinfo=timezone(timedelta(hours=2))))
        | st.just(time(1, tzinfo=ZoneInfo("Europe/Zurich"))),
    ),
    (timedelta, st.timedeltas() | st.integers()),
    (Colour, st.sampled_from(Colour) | st.just("red")),
    (Level, st.just(Level.LOW) | st.just(1)),
    (Mode, st.just(Mode.R) | st.just("r")),
    (Access, st.sampled_from([Access.READ, Access.READ | Access.WRITE])),
    (Name, st.builds(Name, st.text()) | st.text()),
    (UserId, st.integers()),
    (Literal["a", 1, True], st.sampled_from(["a", 1, True, 1.0])),
    (Literal[Mode.R, "s"], st.sampled_from([Mode.R, "r", "s"])),
    (Site, st.builds(Site, st.text(), st.sampled_from(Colour)) | st.tuples(st.text(), st.sampled_from(Colour))),
    (Movie, st.sampled_from([{"name": "a"}, {"year": 1}, {}, {"other": 1}, {"year": True}])),
    (TaskSignature, shapes),
    (Tag, st.builds(Tag, st.text())),
    (Counted, st.builds(Counted, st.integers())),
    (Model, models),
    (Open, st.builds(lambda n, x: Open(n=n, x=x), st.text(), st.integers() | st.sampled_from(Colour))),
    (Strict, st.builds(Strict, path=st.just(Path("a")))),
    (Doubled, st.builds(Doubled, number=st.integers())),
    (Numbers, st.builds(Numbers, st.lists(st.integers()))),
    (Annotated[Cat | Dog, Field(discriminator="kind")], st.builds(Cat) | st.builds(Dog)),
    (Circle | Square, st.builds(Circle, st.integers()) | st.builds(Square, st.integers())),
    (Cat | Dog, st.builds(Cat) | st.builds(Dog)),
    (Colour | str, st.sampled_from(Colour) | st.just("red")),
    (int | str, st.integers() | st.text() | st.booleans()),
    (float | Path, st.floats() | st.integers() | st.just(Path("1"))),
    (Box[int], st.builds(Box, st.integers() | st.text())),
    (Box[Colour], st.builds(Box, st.sampled_from(Colour))),
    (ModelBox[int], st.builds(ModelBox[int], content=st.integers()) | st.builds(ModelBox, content=st.integers())),
    (Login, logins),
    (SecretStr, st.builds(SecretStr, st.text()) | st.text()),
    (IPv4Address, st.just(IPv4Address("1.2.3.4")) | st.just("1.2.3.4")),
    (IPv4Network | IPv6Address, st.just(IPv4Network("1.2.3.0/24")) | st.just(IPv6Address("::1"))),
    (AnyUrl, st.just(AnyUrl("redis://u:p@h:1/0")) | st.just(HttpUrl("https://host/"))),
    (Fraction, st.just(Fraction(1, 3))),
    (complex, st.just(1j)),
    (collections.deque, st.just(collections.deque([1], maxlen=2))),
    (collections.OrderedDict, st.just(collections.OrderedDict(a=1)) | st.just({"a": 1})),
    (collections.defaultdict, st.just(collections.defaultdict(list, a=[1]))),
    (collections.Counter, st.just(collections.Counter("ab"))),
    (list, st.lists(st.integers() | st.sampled_from(Colour))),
    (object, st.builds(object)),
]


kinds = st.recursive(
    st.sampled_from(KINDS),
    lambda inner: inner.flatmap(
        lambda kind: st.sampled_from(
            [
                (list[kind[0]], st.lists(kind[1], max_size=2) | st.lists(kind[1], max_size=1).map(tuple)),
                (dict[str, kind[0]], st.dictionaries(st.text(), kind[1], max_size=2)),
                (tuple[kind[0], ...], st.lists(kind[1], max_size=2).map(tuple) | st.lists(kind[1], max_size=1)),
                (tuple[int, kind[0]], st.tuples(st.integers(), kind[1])),
                (Optional[kind[0]], st.none() | kind[1]),  # noqa: UP045  # what is written is a value here
                (Annotated[kind[0], "documented"], kind[1]),
                (set[kind[0]], st.lists(kind[1], max_size=1).map(_as_set)),
                (frozenset[kind[0]], st.lists(kind[1], max_size=1).map(lambda each: frozenset(_as_set(each)))),
                (Any, kind[1]),
            ]
        )
    ),
    max_leaves=3,
)


def _as_set(elements: list[Any]) -> set[Any]:
    try:
        return set(elements)
    except TypeError:
        return set()


def described(value: Any) -> Any:
    """Fingerprint that distinguishes values, computed without the code under test."""
    if isinstance(value, set | frozenset):
        return (type(value), sorted(map(repr, map(described, value))))
    if isinstance(value, dict):
        return (type(value), [(described(key), described(each)) for key, each in value.items()])
    if isinstance(value, list | tuple):
        return (type(value), [described(each) for each in value])
    if isinstance(value, BaseModel):
        parts = [getattr(value, name) for name in type(value).model_fields]
        return (type(value), described([parts, value.model_extra, value.__pydantic_private__]))
    if dataclasses.is_dataclass(value):
        return (type(value), [described(getattr(value, each.name)) for each in dataclasses.fields(value)])
    if hasattr(value, "get_secret_value"):
        return (type(value), value.get_secret_value())
    if isinstance(value, datetime) and value.tzinfo is not None:
        return (type(value), value.astimezone(UTC).isoformat())  # the instant: zones do not travel
    return (type(value), repr(value))


@given(kinds, st.data(), st.sampled_from(["dataclass", "keywords", "model", "plain"]))
@settings(max_examples=700, deadline=None)
def test_every_value_arrives_as_it_was_or_is_refused_by_name(kind: Any, data: Any, form: str) -> None:
    annotation, values = kind
    value = data.draw(values)
    task: Any
    try:
        task = made(form, annotation, value)
    except Exception:
        return  # the class itself does not take it
    before = described(task.value)
    refusal = None
    try:
        there = arrived(task)
    except TypeError as error:
        refusal = str(error)
    if refusal is None:
        assert described(there.value) == before
    else:
        assert "value" in refusal
        assert "\n" not in refusal


def made(form: str, annotation: Any, value: Any) -> Any:
    """A task of a class of this form, with one argument of this annotation."""
    if form == "model":
        base = create_model("Task", __base__=(BaseTask, BaseModel), value=(annotation, ...))
        return base(value=value)
    if form == "plain":

        class Task(BaseTask):
            def __init__(self, value) -> None:
                self.value = value

        Task.__init__.__annotations__["value"] = annotation
        return Task(value)
    cls = dataclasses.make_dataclass(
        "Task", [("value", annotation)], bases=(BaseTask,), kw_only=form == "keywords"
    )
    return cls(value=value)


@dataclass
class Fits(BaseTask):
    shape: TaskSignature
    drawing: Annotated[Cat | Dog, Field(discriminator="kind")]
    either: Cat | Dog
    colours: dict[Colour, set[Colour]]
    login: Login
    boxes: list[Box[Path]]
    site: Site
    model: Model
    user: UserId
    anything: Any = None
    mode: Mode | None = None
    key: SecretStr | None = None


def test_values_that_fit_their_annotations_arrive() -> None:
    login = Login(user="me", password=SecretStr("sesame"), host=IPv4Address("1.2.3.4"))
    boxes = [Box(Path("a")), Box(Path("b"))]
    colours = {Colour.RED: {Colour.PAIR}}
    site = Site("a", Colour.RED)
    anything = {1: (True, {2.5}), b"x": [datetime(2026, 1, 1, tzinfo=ZoneInfo("Europe/Zurich")), Decimal("NaN")]}
    task = Fits(
        TaskSignature(1),
        Dog(),
        Dog(),
        colours,
        login,
        boxes,
        site,
        Model(low=1, highest=2),
        UserId(1),
        anything,
        Mode.R,
    )
    there = arrived(task)
    for each in dataclasses.fields(Fits):
        assert described(getattr(there, each.name)) == described(getattr(task, each.name))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": Circle(1)}, "'shape' of type .*Circle would arrive as .*TaskSignature; .*Literal"),
        ({"anything": Colour.RED}, "'anything' of type .*Colour would arrive as builtins.str"),
        ({"anything": [TaskSignature(1)]}, "'anything' would not arrive equal"),
        ({"anything": object()}, "'anything': cannot encode a value of type builtins.object"),
        ({"anything": bytearray(b"a")}, "'anything' of type builtins.bytearray would arrive as builtins.bytes"),
        ({"user": True}, None),
        ({"user": Count(1)}, "'user' of type .*Count would arrive as builtins.int"),
        ({"mode": "r"}, "'mode' of type builtins.str would arrive as .*Mode"),
        ({"key": "sesame"}, "'key' of type builtins.str would arrive as .*SecretStr"),
    ],
)
def test_a_refusal_names_the_argument_and_the_way_out(change: dict[str, Any], words: str | None) -> None:
    login = Login(user="me", password=SecretStr("sesame"))
    task = Fits(TaskSignature(1), Dog(), Dog(), {}, login, [], Site("a", Colour.RED), Model(low=1), UserId(1))
    task = dataclasses.replace(task, **change)
    if words is None:
        assert arrived(task) == task
        return
    with pytest.raises(TypeError, match=words) as caught:
        arrived(task)
    assert "sesame" not in str(caught.value)


@dataclass
class Adjusted(BaseTask):
    number: int

    def __post_init__(self) -> None:
        self.number += 1


@dataclass
class Noted(BaseTask):
    number: int
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        pass


class Private(BaseTask, BaseModel):
    number: int
    _notes: list[str] = PrivateAttr(default_factory=list)


class Hand(BaseTask):
    def __init__(self, number: int) -> None:
        self.number = 2 * number


def test_a_class_that_changes_its_arguments_is_refused() -> None:
    for task in (Adjusted(1), Hand(1)):
        with pytest.raises(TypeError, match=r"argument 'number' would not arrive equal"):
            arrived(task)
    noted, private = Noted(1), Private(number=1)
    assert arrived(noted) == noted
    assert arrived(private) == private
    noted.notes.append("lost")
    private._notes.append("lost")
    for task in (noted, private):
        with pytest.raises(TypeError, match="state besides its arguments is lost"):
            arrived(task)


@dataclass
class Plain(BaseTask):
    name: str
    number: int = 1
    share: float | None = None


def test_plain_arguments_of_plain_classes_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("more than a look")

    for name in ("_check", "dumps", "loads", "rebuild"):
        monkeypatch.setattr(f"diracx.tasks.plumbing.messages.roundtrip.{name}", refuse)
    assert Binding(None, TaskRegistry({"test:Task": Plain})).submission(Plain("a")).message.task_args == [
        "a",
        1,
        None,
    ]
