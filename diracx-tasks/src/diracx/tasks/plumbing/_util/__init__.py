"""General helpers: retrying, asyncio tasks, secrets and text, local time, telemetry."""
