"""Pilot submission system for DiracX: keeps compute elements full of pilots, per VO."""

import sys as _sys
from pathlib import Path as _Path

# `core` is a module of the example extension of DiracX. Wherever that lies, one of the two hides the other.
if any((_place / "gubbins" / "core").exists() for _place in (*map(_Path, _sys.path), _Path(__file__).parents[1])):
    raise ImportError(
        "gubbins-pilots and DiracX's example extension gubbins are both installed, and hide or overwrite each "
        "other's modules: uninstall both, then install gubbins-pilots again"
    )
