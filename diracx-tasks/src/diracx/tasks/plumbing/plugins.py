"""Loads plug-ins: classes and modules that entry points of other distributions name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def load_plugin(load: Callable[[], T]) -> T:
    """Call `load`, which imports a plug-in; raise `ImportError` if that ends the process, as `sys.exit()` does."""
    try:
        return load()
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:  # Rust's panics are no Exception either
        raise ImportError(f"its import ends the process: {type(error).__name__}({error})") from error
