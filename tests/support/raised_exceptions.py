"""Exceptions that code of users may raise, and that are hard to describe."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from diracx.tasks.plumbing.exceptions import TaskCancelledError


class Panic(BaseException):
    """An exception like the panics of Rust in Python."""


class WithoutText(Exception):
    def __str__(self) -> str:
        raise Panic

    __repr__ = __str__


class OddText(str):
    def __len__(self) -> int:
        raise Panic

    def __getitem__(self, _: Any) -> str:
        raise Panic


class WithOddText(Exception):
    def __str__(self) -> str:
        return OddText("odd")


class Nameless(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise Panic


class WithoutName(Exception, metaclass=Nameless):
    pass


class WithoutClass(Exception):
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        raise Panic


class Impostor(Exception):
    """Says that it is what it is not."""

    __class__ = TaskCancelledError  # type: ignore[assignment]


def _syntax_error() -> SyntaxError:
    error = SyntaxError("odd")
    error.text, error.lineno, error.offset = 5, "x", object()  # type: ignore[assignment]
    return error


RAISED: dict[str, Callable[[], BaseException]] = {
    "Panic": Panic,
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": lambda: SystemExit(3),
    "GeneratorExit": GeneratorExit,
    "CancelledError": asyncio.CancelledError,
    "StopAsyncIteration": StopAsyncIteration,
    "BaseExceptionGroup": lambda: BaseExceptionGroup("several", [Panic(), ValueError()]),
    "no text": WithoutText,
    "odd text": WithOddText,
    "no name": WithoutName,
    "no class": WithoutClass,
    "impostor": Impostor,
    "odd arguments": lambda: ValueError(WithoutText(), object(), b"\xff" * 100),
    "odd SyntaxError": _syntax_error,
    "surrogates": lambda: ValueError("half \udc80 of a pair, NUL \0"),
    "long": lambda: ValueError("x" * 8_000_000),
}
