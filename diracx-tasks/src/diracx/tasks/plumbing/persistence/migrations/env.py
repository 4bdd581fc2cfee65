"""Alembic runs this."""

from diracx.tasks.plumbing.migrations import run_env

run_env()
