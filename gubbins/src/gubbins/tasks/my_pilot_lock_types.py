"""Type of the objects that pilot tasks lock."""

from __future__ import annotations

from diracx.tasks.plumbing.lock_registry import register_locked_object_type

MY_PILOT = register_locked_object_type("my_pilot")
"""A compute element."""
