"""A record keeps the trace of its sender, and a recovery adds a span to that trace."""

from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from jobguard.tracing import add_span, current_trace
from tests.fakes.world import calm

PROVIDER = TracerProvider()
TRACER = PROVIDER.get_tracer("application")


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Give the spans that jobguard adds."""
    found = InMemorySpanExporter()
    PROVIDER.add_span_processor(SimpleSpanProcessor(found))
    monkeypatch.setattr(trace, "get_tracer", PROVIDER.get_tracer)
    return found


def test_the_context_of_the_present_span() -> None:
    """It is a traceparent inside a span, and nothing outside of one."""
    assert current_trace() is None
    with TRACER.start_as_current_span("request") as span:
        context = span.get_span_context()
        assert current_trace() == (
            f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
        )


def test_it_never_loads_opentelemetry() -> None:
    """A process that has no OpenTelemetry has no trace, and stays without it."""
    code = (
        "import sys, jobguard.tracing as t; assert t.current_trace() is None;"
        "t.add_span('x', '00-' + 'a' * 32 + '-' + 'b' * 16 + '-01', {});"
        "assert 'opentelemetry' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_text_that_is_no_context_adds_no_span(spans: InMemorySpanExporter) -> None:
    """Nothing, another version, and zeros are no context."""
    for text in (None, "", "ff-1", f"00-{0:032x}-{0:016x}-01", "00-" + "g" * 32):
        add_span("x", text, {})
    assert spans.get_finished_spans() == ()


def test_a_recovery_continues_the_trace(spans: InMemorySpanExporter) -> None:
    """After a loss each job with a trace has a span in it, linked to the span that sent the job."""
    world = calm()
    with TRACER.start_as_current_span("request") as span:
        sender = span.get_span_context()
        world.enqueue("traced", trace=current_trace())
    world.enqueue("untraced")
    world.run(6)
    world.flushall()
    world.run_until(lambda: len(world.broker.pushed) == 2, within=10)
    (recovery,) = [one for one in spans.get_finished_spans() if "recover" in one.name]
    assert recovery.context is not None and recovery.parent is not None
    assert recovery.context.trace_id == sender.trace_id
    assert recovery.parent.span_id == sender.span_id
    assert [link.context.span_id for link in recovery.links] == [sender.span_id]
    assert recovery.attributes is not None
    assert recovery.attributes["messaging.message.id"] == "traced"
    assert recovery.attributes["jobguard.cause"] == "incident"
