"""General helpers: retrying, lazy imports, telemetry, text."""
