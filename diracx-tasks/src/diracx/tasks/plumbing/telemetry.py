"""Traces: a task carries the trace of whoever submitted it."""

from __future__ import annotations

import sys


def current_trace_context() -> dict[str, str]:
    """W3C trace headers of the current span, empty when nothing is traced.

    A process that never imported OpenTelemetry has no span, and need not import it for that.
    """
    if "opentelemetry.trace" not in sys.modules:
        return {}
    from opentelemetry import propagate, trace

    if not trace.get_current_span().get_span_context().is_valid:
        return {}
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier
