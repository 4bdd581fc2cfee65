"""Pilot submission system for DiracX: keeps compute elements full of pilots, per VO."""

from pathlib import Path as _Path

if (_Path(__file__).parent / "core").exists():  # a module of DiracX's own example extension
    raise ImportError(
        "gubbins-pilots and DiracX's example extension gubbins are installed in one place, and overwrite each "
        "other's modules: uninstall both, then install gubbins-pilots again"
    )
