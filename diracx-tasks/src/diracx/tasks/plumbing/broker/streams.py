"""Names of the streams, and which queue each of them belongs to. Importing this loads no client of Redis."""

from __future__ import annotations

from .keys import ALL_STREAM_NAMES, DEAD_LETTERS, EVERY_STREAM, HANDOVER, stream_name_for

__all__ = ["ALL_STREAM_NAMES", "DEAD_LETTERS", "EVERY_STREAM", "queue_stream", "resumed_stream", "stream_name_for"]


def queue_stream(stream: str) -> str:
    """The stream of new tasks of the same queue."""
    return stream.removesuffix(HANDOVER)


def resumed_stream(stream: str) -> str:
    """The stream of the same queue for tasks that have waited for a lock: it is fetched first."""
    return stream.removesuffix(HANDOVER) + HANDOVER
