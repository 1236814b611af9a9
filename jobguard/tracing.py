"""The trace of a job, where the application uses OpenTelemetry.

A record keeps the context of the span in which the job was sent, as a W3C ``traceparent``. A recovery
adds a span to that trace. OpenTelemetry is never loaded for this: a process without it has no spans.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


def current_trace() -> str | None:
    """Return the context of the present span; None if there is none."""
    api: Any = sys.modules.get("opentelemetry.trace")
    if api is None:
        return None
    context = api.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def add_span(name: str, trace: str | None, attributes: Mapping[str, str]) -> None:
    """Add a span that is over at once to a trace, with a link to the span that sent the job.

    Without OpenTelemetry in this process, or for a text that is no context, this does nothing.
    """
    api: Any = sys.modules.get("opentelemetry.trace")
    found = _TRACEPARENT.fullmatch(trace or "")
    if api is None or found is None:
        return
    context = api.SpanContext(
        int(found[1], 16),
        int(found[2], 16),
        is_remote=True,
        trace_flags=api.TraceFlags(int(found[3], 16)),
    )
    if not context.is_valid:
        return
    api.get_tracer("jobguard").start_span(
        name,
        context=api.set_span_in_context(api.NonRecordingSpan(context)),
        kind=api.SpanKind.PRODUCER,
        links=[api.Link(context)],
        attributes=attributes,
    ).end()
