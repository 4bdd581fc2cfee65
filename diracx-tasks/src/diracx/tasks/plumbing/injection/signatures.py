"""Reads the signatures of tasks and routes, and adds the dependencies that the types of parameters stand for.

A parameter annotated with a database, a settings class or a cacheable source needs no ``Depends``: the
type decides which DiracX sentinel (``JobDB.transaction``, ``AuthSettings.create``…) stands behind it. The
sentinels themselves are replaced at run time, by the application factory of ``diracx.routers`` or by
``setup_dependency_overrides`` in a worker.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard, get_args, get_origin

from .._util.lazy import LazyScope
from .placeholders import OPENSEARCH, SETTINGS, SOURCE, SQL, innermost

if TYPE_CHECKING:
    from fastapi.params import Depends


class NoTransaction:
    """Marks a SQL database that is wanted without a transaction: ``Annotated[JobDB, NoTransaction()]``.

    The database is given as it is; the code that receives it opens each transaction with ``async with db:``.
    """

    def __repr__(self) -> str:
        return "NoTransaction()"


def is_depends(value: object) -> TypeGuard[Depends]:
    """True if it is a ``Depends`` of FastAPI, which is not imported for that: without it, there are none."""
    cls = getattr(sys.modules.get("fastapi.params"), "Depends", None)
    return cls is not None and isinstance(value, cls)


def auto_inject_depends(params: list[Parameter]) -> list[Parameter]:
    """Add to each parameter the ``Depends`` that its (resolved) annotation asks for.

    SQL databases get one transaction per execution or request, or none with `NoTransaction`; OpenSearch
    databases a session; settings classes their single instance; a subclass of ``AsyncCacheableSource`` the
    data it read, not the source. An explicit ``Depends`` wins, and other parameters are left as they are.

    Raises:
        TypeError: `NoTransaction` on something that has no transactions.
    """
    return [_with_depends(param) for param in params]


def _with_depends(param: Parameter) -> Parameter:
    cls, metadata = _split(param.annotation)
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


def _split(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    if get_origin(annotation) is Annotated:
        bare, *metadata = get_args(annotation)
        return bare, tuple(metadata)
    return annotation, ()


def _depends_for(cls: Any, no_transaction: bool) -> Depends | None:
    family = next((family for family in (SQL, OPENSEARCH, SETTINGS, SOURCE) if family.has(cls)), None)
    if family is None:
        return None
    from fastapi.params import Depends

    # scope="function": FastAPI commits before the response leaves, so that a failed commit is an error
    # the client sees.
    if family is SQL:
        return Depends(cls.no_transaction if no_transaction else cls.transaction, scope="function")
    return Depends(cls.session, scope="function") if family is OPENSEARCH else Depends(cls.create)


def resolved_signature(func: Callable[..., Any]) -> Signature:
    """Return the signature of `func` with string annotations resolved where they were written.

    A return type or a ``**kwargs`` type that cannot be resolved stays a string: nothing is injected by it.

    Raises:
        NameError: a parameter's annotation names something that does not exist at run time.
    """
    try:
        return inspect.signature(func, eval_str=True)
    except (NameError, AttributeError, TypeError, SyntaxError):
        signature = inspect.signature(func)  # and find out which annotation it was
    inner = innermost(func)
    names = getattr(inner, "__globals__", None) or vars(sys.modules[inner.__module__])
    params = []
    for param in signature.parameters.values():
        annotation = param.annotation
        if isinstance(annotation, str):
            try:
                annotation = _evaluate(annotation, names)
            except Exception as error:
                if param.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
                    raise NameError(
                        f"{getattr(inner, '__qualname__', inner)}: the annotation {annotation!r} of "
                        f"parameter {param.name!r} cannot be resolved ({error}); import its names at run "
                        "time, not only under TYPE_CHECKING"
                    ) from error
        params.append(param.replace(annotation=annotation))
    returned = signature.return_annotation
    if isinstance(returned, str):
        try:
            returned = _evaluate(returned, names)
        except Exception:  # FastAPI judges it if it matters
            returned = signature.return_annotation
    return signature.replace(parameters=params, return_annotation=returned)


def loads_at_first_use(func: Callable[..., Any]) -> bool:
    """True if an annotation of `func` names something that its module has yet to import (see `lazy_names`)."""
    if "__getattr__" not in getattr(innermost(func), "__globals__", ()):
        return False
    try:
        inspect.signature(func, eval_str=True)
    except NameError:
        return True
    except Exception:
        return False  # which is told when it is compiled
    return False


def _evaluate(annotation: str, names: dict[str, Any]) -> Any:
    return eval(annotation, LazyScope(names))  # noqa: S307  # source code of this program, as inspect does it
