"""Entry point of Alembic."""

from diracx.tasks.plumbing.sql.migrations import run_env

run_env()
