"""Helpers that know nothing of tasks: retrying, lazy imports, telemetry, text."""
