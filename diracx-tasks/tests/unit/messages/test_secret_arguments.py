"""Values of secret fields are in no error about them: not cut, not escaped, not encoded."""

from __future__ import annotations

import base64
import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal, NamedTuple, NewType
from urllib.parse import quote

import pytest
from diracx.tasks.cli.runtime.registry import make_task
from diracx.tasks.operations.dead_letters import dead_letter_record
from diracx.tasks.operations.masking import masked_arguments
from diracx.tasks.operations.task_classes import shown_signature
from diracx.tasks.plumbing.base_task import BaseTask
from diracx.tasks.plumbing.broker.models import TaskMessage, describe_exception
from diracx.tasks.plumbing.exceptions import TaskArgumentsError
from diracx.tasks.plumbing.messages.arguments import rebuild, secret_names
from diracx.tasks.plumbing.messages.roundtrip import checked_arguments
from diracx.tasks.plumbing.messages.secrets import without_secrets
from diracx.tasks.plumbing.messages.typed_arguments import argument_problems, check_arguments
from diracx.tasks.plumbing.registry import TaskRegistry
from diracx.tasks.plumbing.submission.client import Binding
from pydantic import BaseModel, Field, SecretStr, field_validator, model_validator

SECRET = "correct/horse&battery=staple+é'" + "0123456789" * 5


class Inner(BaseModel):
    pin: int = 0
    key: SecretStr = SecretStr("")


@dataclass
class Number(BaseTask):
    name: str
    password: int = 1
    secret_fields = frozenset({"password"})


@dataclass
class Quoting(BaseTask):
    name: str
    password: str = SECRET
    secret_fields = frozenset({"password"})

    def __post_init__(self) -> None:
        raise ValueError(f"refused {self.password!r} ({self.password[:40]}, {quote(self.password)})")


class Model(BaseTask, BaseModel):
    name: str
    password: Literal["no"] | int
    secret_fields: ClassVar[frozenset[str]] = frozenset({"password"})


class Validating(BaseTask, BaseModel):
    name: str
    password: str
    more: int
    secret_fields: ClassVar[frozenset[str]] = frozenset({"password"})

    @field_validator("password")
    @classmethod
    def refuse(cls, value: str) -> str:
        raise ValueError(f"refused {value[:50]} {base64.b64encode(value.encode()).decode()}")


class Together(BaseTask, BaseModel):
    name: str
    password: str
    secret_fields: ClassVar[frozenset[str]] = frozenset({"password"})

    @model_validator(mode="after")
    def refuse(self) -> Together:
        raise ValueError(f"refused {self.password[3:]}")


@dataclass
class Nested(BaseTask):
    name: str
    password: Inner
    secret_fields = frozenset({"password"})


@dataclass
class Typed(BaseTask):
    name: str
    password: SecretStr | int


class Own(BaseTask):
    secret_fields = frozenset({"password"})

    def __init__(self, name: str, password: str) -> None:
        raise ValueError(f"refused {json.dumps(password)}")

    def serialize(self) -> tuple[Any, ...]:
        return ()


@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
def test_secret_fields_may_be_any_collection_of_names(kind: Any) -> None:
    @dataclass
    class Login(BaseTask):
        password: str
        secret_fields = kind(["password"])

    with pytest.raises(TaskArgumentsError) as caught:
        check_arguments(Login, [[SECRET]], {})
    assert SECRET[:6] not in str(caught.value)


@pytest.mark.parametrize("wrong", ["password", 5, None, ["password", 5]])
def test_secret_fields_that_name_nothing_are_refused_with_the_class(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"test_secret_arguments\..*Login: secret_fields is .* not a set of names"):

        class Login(BaseTask):
            secret_fields = wrong


CLASSES = [Number, Quoting, Model, Validating, Together, Nested, Typed, Own]
GIVEN = [SECRET, [SECRET], {"pin": SECRET}, {"key": [SECRET]}, [[SECRET[:30]]]]


def checked(cls: Any, given: Any) -> None:
    check_arguments(cls, ["me"], {"password": given, **_more(cls)})


def typed(cls: Any, given: Any) -> None:
    make_task(TaskRegistry({"t:T": cls}), "T", json.dumps(["me"]), json.dumps({"password": given, **_more(cls)}))


def malformed(cls: Any, given: Any) -> None:
    make_task(TaskRegistry({"t:T": cls}), "T", "[]", json.dumps({"password": given})[:-1])


def in_place_of_the_name(cls: Any, given: Any) -> None:
    check_arguments(cls, [given, given, given, given, given], {})


def built(cls: Any, given: Any) -> None:
    rebuild(cls, ["me", given, *_more(cls).values()], {})


def incomplete(cls: Any, given: Any) -> None:
    rebuild(cls, [], {"password": given})


def configured(cls: Any, given: Any) -> None:
    problems = argument_problems(cls, {"name": "me", "password": given, **_more(cls)})
    raise ValueError(str(problems))


def _more(cls: Any) -> dict[str, Any]:
    return {"more": "x"} if cls is Validating else {}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("given", GIVEN, ids=str)
@pytest.mark.parametrize("use", [checked, typed, malformed, in_place_of_the_name, built, incomplete, configured])
def test_no_error_about_arguments_shows_a_secret(use: Callable[[Any, Any], None], cls: Any, given: Any) -> None:
    try:
        use(cls, given)
    except Exception as error:
        reported = str(error) + "".join(traceback.format_exception(error))
        _assert_hidden(reported)
        assert "argu•" not in reported or cls is Own  # all of whose arguments may be secret


def _assert_hidden(text: str) -> None:
    data = SECRET.encode()
    encodings = [base64.b64encode(data[skipped:]).decode() for skipped in range(3)]
    for form in (SECRET, json.dumps(SECRET), repr(SECRET), quote(SECRET), data.hex(), *encodings):
        for start in range(len(form) - 8):
            assert form[start : start + 8] not in text, text


def test_an_argument_that_cannot_be_serialised_is_refused_without_being_shown() -> None:
    for task in (Number("me", [SECRET, object()]), Nested("me", {"pin": {object(): SECRET}})):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="'password'") as caught:
            checked_arguments(task)
        _assert_hidden("".join(traceback.format_exception(caught.value)))


def test_the_error_of_a_task_is_reported_without_secrets_even_if_pydantic_truncates_it() -> None:
    task = Typed("me", SecretStr(SECRET))
    try:
        Inner(pin=f"{SECRET}", key="x")
    except ValueError as error:
        description = describe_exception(error, hide=lambda text: without_secrets(text, task))
    assert "•••" in description["message"]
    _assert_hidden(description["message"] + description["traceback"])


def test_a_default_that_is_secret_is_in_no_signature() -> None:
    assert shown_signature(Quoting) == "(name: str, password: str = •••)"


class Login(NamedTuple):
    user: str
    password: SecretStr


Password = NewType("Password", SecretStr)


@dataclass
class Wrapped(BaseTask):
    login: Login
    passwords: list[Password]
    name: str = ""


def test_a_pydantic_secret_makes_the_argument_secret_that_holds_it_in_whatever_wrapping() -> None:
    assert secret_names(Wrapped) == {"login", "passwords"}


def test_a_pydantic_secret_is_masked_wherever_arguments_are_shown() -> None:
    message = Binding(None, TaskRegistry({"t:T": Typed})).submission(Typed("me", SecretStr(SECRET))).message
    there = TaskMessage.loadb(message.dumpb())
    assert there.task_args[1] == SecretStr(SECRET)
    for cls in (Typed, None):
        shown = masked_arguments(cls, there)
        assert "me" in shown.values()
        _assert_hidden(json.dumps(shown))
    there.labels.clear()  # as of a task that was submitted without its class
    dead_letter = {
        **dict.fromkeys(("id", "task_id", "task_name", "vo", "reason", "detail", "status", "delivery_id"), ""),
        **dict.fromkeys(("buried_at", "changed_at"), datetime.now(UTC)),
        "attempts": [],
        "history": [],
        **dict.fromkeys(("failed_attempts", "earlier_burials", "message_bytes"), 0),
        "message": there.dumpb(),
    }
    record = dead_letter_record(dead_letter)
    assert record["raw"] is None
    _assert_hidden(json.dumps(record))


# --- fields that are declared secret and are not there ----------------------------------------------------------


@dataclass
class Misspelt(BaseTask):
    password: str
    secret_fields = frozenset({"pasword"})


class MisspeltModel(BaseTask, BaseModel):
    password: str = Field(alias="passWord")
    secret_fields: ClassVar[frozenset[str]] = frozenset({"passWord"})


class MisspeltInit(BaseTask):
    def __init__(self, password: str) -> None:
        self.password = password

    secret_fields = frozenset({"token"})


@pytest.mark.parametrize("task_class", [Misspelt, MisspeltModel, MisspeltInit])
def test_a_secret_field_that_is_not_there_keeps_the_class_from_being_registered(
    task_class: type[BaseTask],
) -> None:
    [wrong] = task_class.secret_fields
    with pytest.raises(TypeError, match=f"secret_fields has unknown fields '{wrong}'; the fields are password"):
        TaskRegistry({"my:Task": task_class})


@dataclass
class Base(BaseTask):
    password: str
    login: str = ""
    secret_fields = frozenset({"password", "login"})


class Narrowed(Base):
    def __init__(self, login: str) -> None:
        super().__init__("constant", login)


class AnyKeyword(BaseTask):
    def __init__(self, **settings: str) -> None:
        self.settings = settings

    secret_fields = frozenset({"password"})


@pytest.mark.parametrize("task_class", [Number, Model, Base, Narrowed, AnyKeyword])
def test_a_secret_field_of_a_base_or_of_any_keyword_is_accepted(task_class: type[BaseTask]) -> None:
    assert task_class in TaskRegistry({"my:Task": task_class}).values()
