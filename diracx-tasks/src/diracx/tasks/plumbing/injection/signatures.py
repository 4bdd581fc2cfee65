"""Reads the signatures of tasks and routes, and adds a ``Depends`` to parameters by their types.

A parameter annotated with a database, a settings class or a cacheable source needs no ``Depends``: its type
determines the DiracX sentinel (``JobDB.transaction``, ``AuthSettings.create``…). The application factory of
``diracx.routers``, or ``setup_dependency_overrides`` in a worker, replaces the sentinels at run time.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard, get_args, get_origin

from ..lazy import LazyScope
from .placeholders import OPENSEARCH, SETTINGS, SOURCE, SQL, innermost

if TYPE_CHECKING:
    from fastapi.params import Depends


class NoTransaction:
    """Marks a SQL database to inject without a transaction: ``Annotated[JobDB, NoTransaction()]``.

    The code that receives the database opens each transaction with ``async with db:``.
    """

    def __repr__(self) -> str:
        return "NoTransaction()"


def is_depends(value: object) -> TypeGuard[Depends]:
    """True for a ``Depends`` of FastAPI. Does not import FastAPI: without it, there can be none."""
    cls = getattr(sys.modules.get("fastapi.params"), "Depends", None)
    return cls is not None and isinstance(value, cls)


def auto_inject_depends(params: list[Parameter]) -> list[Parameter]:
    """Add to each parameter the ``Depends`` for its (resolved) annotation.

    SQL databases get one transaction per execution or request, or none with `NoTransaction`; OpenSearch
    databases a session; settings classes their single instance; a subclass of ``AsyncCacheableSource`` the
    data that it read, not the source. Parameters with an explicit ``Depends``, or of other types, do not change.

    Raises:
        TypeError: `NoTransaction` on a type without transactions.
    """
    return [_with_depends(param) for param in params]


def _with_depends(param: Parameter) -> Parameter:
    cls, metadata = split_annotated(param.annotation)
    explicit = is_depends(param.default) or any(map(is_depends, metadata))
    variadic = param.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    if explicit or variadic or not inspect.isclass(cls):
        return param
    no_transaction = any(isinstance(item, NoTransaction) or item is NoTransaction for item in metadata)
    depends = _depends_for(cls, no_transaction)
    if depends is None:
        return param
    if no_transaction and not SQL.has(cls):
        raise TypeError(f"Parameter {param.name!r}: {cls.__name__} has no transactions; remove NoTransaction()")
    kept = [item for item in metadata if not (isinstance(item, NoTransaction) or item is NoTransaction)]
    return param.replace(annotation=Annotated[(cls, *kept, depends)])


def split_annotated(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    if get_origin(annotation) is Annotated:
        bare, *metadata = get_args(annotation)
        return bare, tuple(metadata)
    return annotation, ()


def _depends_for(cls: Any, no_transaction: bool) -> Depends | None:
    family = next((family for family in (SQL, OPENSEARCH, SETTINGS, SOURCE) if family.has(cls)), None)
    if family is None:
        return None
    from fastapi.params import Depends

    # scope="function": FastAPI commits before it sends the response, so that the client gets an error if the
    # commit fails.
    if family is SQL:
        return Depends(cls.no_transaction if no_transaction else cls.transaction, scope="function")
    return Depends(cls.session, scope="function") if family is OPENSEARCH else Depends(cls.create)


def resolved_signature(func: Callable[..., Any]) -> Signature:
    """Return the signature of `func` with string annotations resolved in their module.

    A return type or a ``**kwargs`` type that cannot be resolved stays a string: neither is injected.

    Raises:
        NameError: a parameter's annotation uses a name that does not exist at run time.
    """
    with suppress(NameError, AttributeError, TypeError, SyntaxError):
        return inspect.signature(func, eval_str=True)
    # One by one, to name the wrong annotation.
    signature, inner = inspect.signature(func), innermost(func)
    names = getattr(inner, "__globals__", None) or vars(sys.modules[inner.__module__])
    params = []
    for param in signature.parameters.values():
        annotation = param.annotation
        try:
            annotation = _evaluated(annotation, names)
        except Exception as error:
            if param.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
                raise NameError(
                    f"{getattr(inner, '__qualname__', inner)}: the annotation {annotation!r} of parameter "
                    f"{param.name!r} cannot be resolved ({error}); import its names at run time, not only under "
                    "TYPE_CHECKING"
                ) from error
        params.append(param.replace(annotation=annotation))
    returned = signature.return_annotation
    with suppress(Exception):  # FastAPI reports it if it uses the return type
        returned = _evaluated(returned, names)
    return signature.replace(parameters=params, return_annotation=returned)


def loads_at_first_use(func: Callable[..., Any]) -> bool:
    """True if an annotation of `func` uses a name that its module imports lazily (see `lazy_names`)."""
    if "__getattr__" not in getattr(innermost(func), "__globals__", ()):
        return False
    try:
        inspect.signature(func, eval_str=True)
    except NameError:
        return True
    except Exception:
        return False  # compiling the plan will raise it
    return False


def _evaluated(annotation: Any, names: dict[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    return eval(annotation, LazyScope(names))  # noqa: S307  # source code of this program; `inspect` does the same
