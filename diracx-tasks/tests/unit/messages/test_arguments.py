from __future__ import annotations

import enum
import sys
from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple
from uuid import UUID

import pytest
from diracx.tasks.plumbing.base_task import BaseTask, PeriodicVoAwareBaseTask
from diracx.tasks.plumbing.enums import Priority
from diracx.tasks.plumbing.exceptions import TaskArgumentsError
from diracx.tasks.plumbing.messages.arguments import field_names, rebuild, serialize
from diracx.tasks.plumbing.messages.codec import dumps, loads
from diracx.tasks.plumbing.messages.typed_arguments import check_arguments
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

if TYPE_CHECKING:
    from nowhere import Missing


def travel(task: Any) -> Any:
    """Send a task over the wire and rebuild it, as submission and worker do."""
    return rebuild(type(task), loads(dumps(task.serialize())), {})


class Colour(enum.Enum):
    RED = "red"
    PAIR = (1, 2)


class Site(NamedTuple):
    name: str
    slots: int


@dataclass(frozen=True)
class Tag:
    name: str


@dataclass
class Leaf:
    path: Path
    when: datetime | None = None
    colour: Colour = Colour.RED


@dataclass
class Tree:
    leaf: Leaf
    leaves: list[Leaf] = field(default_factory=list)
    by_name: dict[str, Leaf] = field(default_factory=dict)
    left: Tree | None = None


class Limits(BaseModel):
    low: int
    high: int = Field(alias="highest")


# ---- the kinds of task ----


@dataclass
class DataTask(BaseTask):
    vo: str
    count: int
    tree: Tree
    when: datetime
    job: UUID
    share: float = 0.5
    colours: tuple[Colour, ...] = ()
    days: set[date] = field(default_factory=set)
    tags: frozenset[Tag] = frozenset()
    either: Leaf | int | None = None
    budget: Decimal = Decimal(0)
    wait: timedelta = timedelta(0)
    site: Site | None = None
    anything: Any = None


@dataclass(kw_only=True)
class KeywordTask(BaseTask):
    vo: str
    leaf: Leaf
    colour: Colour = Colour.RED


@dataclass
class HalfKeywordTask(BaseTask):
    first: str = field(kw_only=True)
    second: Path
    third: int = 3


class ModelTask(BaseTask, BaseModel):
    vo: str
    tree: Tree
    colour: Colour = Colour.RED
    when: datetime | None = None
    limits: Limits | None = None
    ce: str = Field(default="", alias="ceName")


class StrictModelTask(BaseTask, BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)
    priority: ClassVar[Priority] = Priority.REALTIME
    path: Path
    leaves: tuple[Leaf, ...]


class PlainTask(BaseTask):
    def __init__(self, vo: str, leaf: Leaf | None = None, *, colour: Colour = Colour.RED) -> None:
        self.vo = vo
        self._leaf = leaf
        self.colour = colour

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlainTask) and vars(self) == vars(other)

    __hash__ = None


leaves = st.builds(
    Leaf,
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1).map(Path),
    st.none() | st.datetimes(timezones=st.just(UTC)),
    st.sampled_from(Colour),
)
trees = st.recursive(
    st.builds(Tree, leaves),
    lambda inner: st.builds(
        Tree,
        leaves,
        st.lists(leaves, max_size=3),
        st.dictionaries(st.text(), leaves, max_size=3),
        st.none() | inner,
    ),
    max_leaves=3,
)
plain = st.recursive(
    st.none() | st.integers() | st.text() | st.dates() | st.uuids(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
data_tasks = st.builds(
    DataTask,
    vo=st.text(),
    count=st.integers(),
    tree=trees,
    when=st.datetimes(timezones=st.just(UTC)),
    job=st.uuids(),
    share=st.floats(allow_nan=False),
    colours=st.lists(st.sampled_from(Colour)).map(tuple),
    days=st.sets(st.dates()),
    tags=st.frozensets(st.builds(Tag, st.text())),
    either=st.none() | st.integers() | leaves,
    budget=st.decimals(allow_nan=False),
    wait=st.timedeltas(),
    site=st.none() | st.builds(Site, st.text(), st.integers()),
    anything=plain,
)
model_tasks = st.builds(
    ModelTask,
    vo=st.text(),
    tree=trees,
    colour=st.sampled_from(Colour),
    when=st.none() | st.datetimes(timezones=st.just(UTC)),
    limits=st.none() | st.builds(Limits, low=st.integers(), highest=st.integers()),
    ceName=st.text(),
)
tasks = st.one_of(
    data_tasks,
    st.builds(KeywordTask, vo=st.text(), leaf=leaves, colour=st.sampled_from(Colour)),
    st.builds(HalfKeywordTask, first=st.text(), second=st.just(Path("a/b")), third=st.integers()),
    model_tasks,
    st.builds(StrictModelTask, path=st.just(Path("x")), leaves=st.lists(leaves, max_size=3).map(tuple)),
    st.builds(PlainTask, st.text(), st.none() | leaves, colour=st.sampled_from(Colour)),
)


@given(tasks)
@settings(max_examples=400, deadline=None)
def test_P50_every_kind_of_task_round_trips(task):
    back = travel(task)
    assert type(back) is type(task)
    assert back == task


def test_P13_an_aware_datetime_argument_keeps_its_instant():
    when = datetime.fromisoformat("2026-03-29T02:30:00.123456+02:00")
    task = DataTask("lhcb", 1, Tree(Leaf(Path("a"), when)), when, UUID(int=1))
    back = travel(task)
    assert back.when == when == back.tree.leaf.when
    assert back.when.utcoffset() == timedelta(0)


def test_fields_are_in_order_and_class_variables_are_none():
    assert field_names(KeywordTask) == ("vo", "leaf", "colour")
    assert field_names(ModelTask) == ("vo", "tree", "colour", "when", "limits", "ce")
    assert field_names(PlainTask) == ("vo", "leaf", "colour")
    assert field_names(StrictModelTask) == ("path", "leaves")
    assert field_names(BaseTask) == ()
    assert serialize(HalfKeywordTask(Path("x"), first="a")) == ("a", Path("x"), 3)


class VoTask(PeriodicVoAwareBaseTask):
    pass


class OwnSerialize(BaseTask):
    def __init__(self, code: str, path: Path = Path()) -> None:
        self.number, self.path = int(code), path

    def serialize(self) -> tuple[Any, ...]:
        return (str(self.number), self.path)


@dataclass
class OwnSerializeDataclass(BaseTask):
    text: str
    parts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = self.text.split(",")

    def serialize(self) -> tuple[Any, ...]:
        return (",".join(self.parts),)


class OwnSerializeModel(BaseTask, BaseModel):
    number: int

    def __init__(self, code: str) -> None:
        super().__init__(number=int(code))

    def serialize(self) -> tuple[Any, ...]:
        return (str(self.number),)


class StarTask(BaseTask):
    def __init__(self, *names: str) -> None:
        self.names = names

    def serialize(self) -> tuple[Any, ...]:
        return self.names


def test_P50_a_class_with_its_own_serialize_is_rebuilt_by_position():
    back = travel(OwnSerialize("7", Path("a")))
    assert (back.number, back.path) == (7, Path("a"))
    assert travel(OwnSerializeDataclass("a,b")).parts == ["a", "b"]
    assert travel(OwnSerializeModel("7")).number == 7
    assert travel(StarTask("a", "b")).names == ("a", "b")


@dataclass
class Sloppy(BaseTask):
    """A task whose values do not match their annotations."""

    path: Path = None  # type: ignore[assignment]
    leaf: Leaf = None  # type: ignore[assignment]
    count: int = "many"  # type: ignore[assignment]
    when: datetime = "tomorrow"  # type: ignore[assignment]


def test_P50_values_that_do_not_fit_their_annotation_arrive_as_they_were_sent():
    assert travel(Sloppy()) == Sloppy()
    # A nested dataclass is one again even though one of its values is wrong.
    assert travel(Sloppy(leaf=Leaf(None, "soon"))) == Sloppy(leaf=Leaf(None, "soon"))  # type: ignore[arg-type]


@dataclass
class Unresolvable(BaseTask):
    thing: Missing
    path: Path


def test_P50_an_unresolvable_annotation_does_not_affect_the_others():
    assert travel(Unresolvable({"a": 1}, Path("x"))) == Unresolvable({"a": 1}, Path("x"))


def test_P50_classes_local_to_a_function_keep_their_plain_values():
    @dataclass
    class Local:
        n: int

    @dataclass
    class LocalTask(BaseTask):
        local: Local
        n: int

    assert travel(LocalTask(Local(1), 2)) == LocalTask({"n": 1}, 2)  # type: ignore[arg-type]


@dataclass
class IterableTask(BaseTask):
    paths: Iterable[Path]


def test_an_iterable_can_be_read_more_than_once():
    assert travel(IterableTask([Path("a")])).paths == [Path("a")]


def test_older_messages_lists_for_tuples_and_missing_defaults_are_understood():
    task = rebuild(DataTask, ["lhcb", 1, {"leaf": {"path": "a"}}, "2026-01-01T00:00:00Z", str(UUID(int=1))], {})
    assert task.tree == Tree(Leaf(Path("a")))
    assert (task.when, task.job, task.colours) == (datetime(2026, 1, 1, tzinfo=UTC), UUID(int=1), ())
    assert rebuild(KeywordTask, [], {"vo": "x", "leaf": {"path": "a"}}) == KeywordTask(
        vo="x", leaf=Leaf(Path("a"))
    )


@pytest.mark.parametrize(
    ("cls", "args", "kwargs"),
    [(VoTask, [], {}), (VoTask, ["a", "b"], {}), (VoTask, ["a"], {"vo": "b"}), (ModelTask, ["a"], {})],
)
def test_arguments_that_the_class_does_not_take_are_refused_by_rebuild(cls, args, kwargs):
    with pytest.raises(TaskArgumentsError, match=rf"^{cls.__name__}\("):
        rebuild(cls, args, kwargs)


@dataclass
class Plain(BaseTask):
    a: str
    b: list[dict[str, int | None]]
    c: Literal["x", "y"] = "x"
    d: Annotated[float, "seconds"] = 0


def test_plain_classes_do_not_use_pydantic(monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pydantic on the hot path")

    monkeypatch.setattr("pydantic.TypeAdapter", refuse)
    for wrong in (Plain("a", [{"b": 1}]), Plain(1, 2, 3, 4)):  # type: ignore[arg-type]
        assert travel(wrong) == wrong


@dataclass
class Lossy(BaseTask):
    path: Path
    twice: InitVar[int]


class Forgetful(BaseTask):
    def __init__(self, path: Path) -> None:
        pass


def test_a_class_that_does_not_store_its_arguments_is_a_clear_error():
    with pytest.raises(TypeError, match=r"Lossy takes 'twice'.* override serialize"):
        Lossy(Path("a"), 2).serialize()
    with pytest.raises(TypeError, match=r"Forgetful\(path: Path\): .* 'path'.*override serialize"):
        Forgetful(Path("a")).serialize()


# ---- what people type ----


@dataclass
class MyTask(BaseTask):
    ce_name: str
    vo: str


@dataclass
class Typed(BaseTask):
    n: int
    when: datetime | None = None
    leaf: Leaf | None = None
    flags: tuple[bool, ...] = ()
    share: Annotated[float, Field(le=1)] = 0.5
    names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.n < 0:
            raise ValueError("n must not be\nnegative")


class TypedModel(BaseTask, BaseModel):
    n: int
    names: list[str] = []
    ce: str = Field(default="", alias="ceName")

    @field_validator("names", mode="before")
    @classmethod
    def split(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @model_validator(mode="after")
    def check(self) -> TypedModel:
        if self.n == 13:
            raise ValueError("13 is unlucky")
        return self


class Takes(BaseTask):
    def __init__(self, thing, other=None):
        self.thing, self.other = thing, other


class Keeps(BaseTask):
    def __init__(self, n: int) -> None:
        self.n = object()


def test_typed_values_are_converted_by_their_annotations():
    assert check_arguments(MyTask, ["ce"], {"vo": "lhcb"}) == MyTask("ce", "lhcb")
    task = check_arguments(
        Typed,
        [3, "2026-01-01T12:00:00+02:00"],
        {"leaf": {"path": "a", "colour": "red"}, "flags": [True], "share": 1, "names": ["x"]},
    )
    when = datetime(2026, 1, 1, 10, tzinfo=UTC)
    assert task == Typed(3, when, Leaf(Path("a")), (True,), 1.0, {"x"})
    assert check_arguments(Typed, [3], {"when": when, "names": {"x"}}) == Typed(3, when, names={"x"})
    model = check_arguments(TypedModel, [1, "a,b"], {"ceName": "x"})
    assert (model.n, model.names, model.ce) == (1, ["a", "b"], "x")
    assert check_arguments(TypedModel, [1], {"ce": "x"}).ce == "x"
    assert check_arguments(KeywordTask, [], {"vo": "a", "leaf": {"path": "p"}}).leaf == Leaf(Path("p"))
    assert check_arguments(Takes, [[1, {"a": None}]], {}).thing == [1, {"a": None}]
    assert check_arguments(OwnSerialize, ["7", "a"], {}).path == Path("a")
    assert check_arguments(StarTask, ["a", "b"], {}).names == ("a", "b")


MY_TASK = "MyTask(ce_name: str, vo: str): "
TYPED = "Typed(n: int, when: datetime | None = None, leaf: Leaf | None = None, "


@pytest.mark.parametrize(
    ("cls", "args", "kwargs", "start", "inside"),
    [
        (MyTask, ["ce"], {}, MY_TASK, "missing argument 'vo'"),
        (MyTask, [], {}, MY_TASK, "missing arguments 'ce_name', 'vo'"),
        (MyTask, ["a", "b", "c"], {}, MY_TASK, "3 positional arguments given, it takes 2"),
        (MyTask, ["a", "b"], {"vo": "c"}, MY_TASK, "argument 'vo' given twice"),
        (MyTask, ["a"], {"v0": "c"}, MY_TASK, "unknown argument 'v0' (did you mean 'vo'?)"),
        (MyTask, ["a", 5], {}, MY_TASK, "argument 'vo': input should be a valid string, given 5"),
        (MyTask, ["a", None], {}, MY_TASK, "argument 'vo'"),
        (Typed, ["abc"], {}, TYPED, "argument 'n': input should be a valid integer, given 'abc'"),
        (Typed, [True], {}, TYPED, "argument 'n'"),
        (Typed, [1.5], {}, TYPED, "argument 'n'"),
        (Typed, [1, "yesterday"], {}, TYPED, "argument 'when"),
        (Typed, [1], {"leaf": {"path": "a", "colour": "blue"}}, TYPED, "argument 'leaf'.colour"),
        (Typed, [1], {"leaf": {}}, TYPED, "argument 'leaf'.path: field required"),
        (Typed, [1], {"share": 2}, TYPED, "argument 'share': input should be less than or equal to 1"),
        (Typed, [-1], {}, TYPED, "n must not be negative"),
        (TypedModel, [], {}, "TypedModel(n: int, ", "missing argument 'n'"),
        (TypedModel, ["abc"], {}, "TypedModel(n: int, ", "argument 'n': input should be a valid integer"),
        (TypedModel, [1, [2]], {}, "TypedModel(n: int, ", "argument 'names.0'"),
        (TypedModel, [1], {"nope": 1}, "TypedModel(n: int, ", "unknown argument 'nope'"),
        (TypedModel, [13], {}, "TypedModel(n: int, ", "13 is unlucky"),
        (OwnSerialize, ["x"], {}, "OwnSerialize(code: str, ", "invalid literal"),
        (Takes, [object()], {}, "Takes(thing, other = None): ", "cannot encode a value of type builtins.object"),
        (Keeps, [1], {}, "Keeps(n: int): ", "cannot encode a value of type builtins.object"),
        (Takes, [{Tag("a"): 1}], {}, "Takes(thing, other = None): ", "unhashable"),
    ],
)
def test_P52_wrong_arguments_are_refused_in_one_line(cls, args, kwargs, start, inside):
    with pytest.raises(TaskArgumentsError) as caught:
        check_arguments(cls, args, kwargs)
    message = str(caught.value)
    assert message.startswith(start)
    assert inside in message
    assert "\n" not in message


def test_P53_the_module_does_not_import_pydantic():
    assert "TypeAdapter" not in vars(sys.modules["diracx.tasks.plumbing.messages.arguments"])
