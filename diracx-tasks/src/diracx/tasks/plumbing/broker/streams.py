"""Names of the streams, and the queue of each. Importing this module does not import redis-py."""

from __future__ import annotations

from .keys import ALL_STREAM_NAMES, DEAD_LETTERS, EVERY_STREAM, RESUMED_SUFFIX, stream_name_for

__all__ = ["ALL_STREAM_NAMES", "DEAD_LETTERS", "EVERY_STREAM", "queue_stream", "resumed_stream", "stream_name_for"]


def queue_stream(stream: str) -> str:
    """Stream of new tasks of the same queue."""
    return stream.removesuffix(RESUMED_SUFFIX)


def resumed_stream(stream: str) -> str:
    """Stream of the same queue for tasks that have waited for a lock: it is fetched first."""
    return stream.removesuffix(RESUMED_SUFFIX) + RESUMED_SUFFIX
